"""Panels and queries that several dashboards have."""

from deploy.grafana.source.panels import BAD, GOOD, QUANTILES, Json, stat, states, steps, target
from deploy.grafana.source.queries import quantile, select

EXEMPLARS = " Points are single requests: their request id leads to their log line."


def quantiles(
    metric: str, by: str = "", legend: str = "", *, exemplars: bool = False
) -> list[Json]:
    """p50, p95 and p99; exemplars: drawn once, since all three have the same."""
    return [
        target(quantile(q, metric, by), legend + name, exemplars=exemplars and name == "p50")
        for name, q in QUANTILES.items()
    ]


def distribution(histogram: str) -> str:
    """For a heatmap: how much each bucket grew."""
    return f"sum by (le) (increase({select(f'{histogram}_bucket')}[$__rate_interval]))"


def kill_switch() -> Json:
    unsteered, reject = (
        select("deshift_kill_switch", f'action="{action}"') for action in ("unsteered", "reject")
    )
    return stat(
        "Kill switch",
        "Overrides every tenant's policy, on at least one of the replicas shown.",
        "none",
        f"max({unsteered}) + 2 * max({reject})",
        thresholds=steps((1, BAD)),
        mappings=states(
            _0=("off", GOOD),
            _1=("unsteered", BAD),
            _2=("reject", BAD),
            _3=("unsteered / reject", BAD),
        ),
    )
