"""A request that has ended -> its metrics. Does not cover what is read at a scrape (state.py)."""

from typing import Literal

from server.engine.types import RequestTimings
from server.metrics.catalogue import RequestFamilies
from server.metrics.tenants import TenantLabels
from server.record import RequestRecord
from server.steered import Steered

Outcome = Literal[
    "success",
    "cancelled",
    "timeout",
    "invalid",
    "unauthorized",
    "limited",
    "unavailable",
    "error",
]
_OF_STATUS: dict[int, Outcome] = {
    200: "success",
    401: "unauthorized",
    403: "unauthorized",
    408: "timeout",
    429: "limited",
    499: "cancelled",
    503: "unavailable",
}


def outcome_of(record: RequestRecord) -> Outcome:
    """By its status, but for a stream that broke after its head."""
    if record.failure is not None:
        return "timeout" if record.failure == "timeout" else "error"
    known = _OF_STATUS.get(record.status)
    return known or ("invalid" if 400 <= record.status < 500 else "error")


class RequestMetrics:
    """Fills the families, one record after the other. Event loop only."""

    def __init__(self, families: RequestFamilies, tenants: TenantLabels) -> None:
        self._families = families
        self._tenants = tenants

    def observe(self, record: RequestRecord) -> None:
        """Only chats count; an observer of requests, so it does not raise."""
        if not record.is_chat:
            return
        families = self._families
        tenant, mode = self._tenants.label(record.tenant), _mode(record)
        families.requests.inc(tenant, mode, outcome_of(record))
        if "media" in record.stages and record.has_images:
            families.image_decode.observe(record.stages["media"])
        if "prepare" in record.stages:
            families.prepare.observe(record.stages["prepare"])
        if record.timings is not None:
            self._finished(record, record.timings, tenant, mode)

    def _finished(
        self, record: RequestRecord, timings: RequestTimings, tenant: str, mode: str
    ) -> None:
        families, request_id = self._families, record.request_id
        submitted_at = record.submitted_at or record.started
        ttft_s = submitted_at - record.started + timings.time_to_first_token_s
        e2e_s = (record.ended_at or record.started) - record.started
        families.ttft.observe(ttft_s, mode, request_id=request_id)
        families.e2e.observe(e2e_s, mode, request_id=request_id)
        families.queue_time.observe(timings.queue_s)
        families.prefill_time.observe(timings.prefill_s, mode)
        families.prompt_tokens.inc(tenant, by=record.prompt_tokens)
        families.generation_tokens.inc(tenant, by=record.completion_tokens)
        if record.projection is not None:
            # A sum that falls would be no sum of a histogram to Prometheus.
            families.projection.observe(max(0.0, record.projection), tenant)
        if record.steered is not None:
            self._steered(record.steered, timings, (tenant, mode), e2e_s, request_id)

    def _steered(
        self,
        steered: Steered,
        timings: RequestTimings,
        labels: tuple[str, str],
        e2e_s: float,
        request_id: str,
    ) -> None:
        families, (tenant, mode) = self._families, labels
        if steered.plan.reason is not None:
            families.skipped.inc(tenant, steered.plan.reason)
            return
        overhead = steered.overhead(timings)
        families.overhead.observe(overhead.total_s, tenant, mode, request_id=request_id)
        if e2e_s > 0:
            families.overhead_ratio.observe(overhead.total_s / e2e_s, tenant, mode)
        for stage, seconds in overhead.by_stage.items():
            if stage != "shift" or mode == "sample" or seconds:  # at dataset level only of a gate
                families.stage.observe(seconds, mode, stage)
        families.dose.observe(steered.relative_dose, mode)


def _mode(record: RequestRecord) -> str:
    """What was applied, or was to be when the engine was asked; off where it never was."""
    steered = record.steered
    if steered is None or not steered.plan.is_active or record.submitted_at is None:
        return "off"
    return steered.plan.mode
