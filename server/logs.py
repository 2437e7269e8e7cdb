"""Logging: how the process is set up for it, and the one line that each request gets.

Never prompts, answers, pictures or keys. Does not cover what others log on the way.
"""

import logging

from server.record import RequestRecord

log = logging.getLogger("deshift.requests")
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})  # asked again and again by machines


def configure_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def log_request(record: RequestRecord) -> None:
    """An observer of requests."""
    level = logging.DEBUG if record.path in OPEN_PATHS else logging.INFO
    principal, ended = record.principal, record.ended_at or record.started
    log.log(
        level,
        "request_id=%s tenant=%s key=%s method=%s path=%s status=%d prompt_tokens=%d "
        "completion_tokens=%d steering=%s seconds=%.3f",
        record.request_id,
        principal.tenant if principal else "-",
        (principal.key_id if principal else "") or "-",
        ascii(record.method)[1:-1],
        ascii(record.path),  # quoted and escaped: a path may hold spaces, CR and LF
        record.status,
        record.prompt_tokens,
        record.completion_tokens,
        record.steered.log_value if record.steered else "-",
        ended - record.started,
    )
