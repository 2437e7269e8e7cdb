"""Does steering work on this model? Suites of prompts, judges, statistics, the report.

Speaks to a server over HTTP only; starts none (server/cli/evaluate.py does).
"""
