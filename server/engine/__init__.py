"""The embedded engine: continuous batching of steered vision-language models.

Imports no FastAPI, pydantic, Redis or Prometheus: requests come in and events go out as the
plain types of `types.py`.
"""
