"""Measure OpenAI-compatible servers side by side, interleaved in one run.

Does not judge answers (steering.evaluate does) and does not profile.
"""
