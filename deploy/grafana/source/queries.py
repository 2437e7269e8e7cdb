"""PromQL that the dashboards share. Every selector is narrowed by their variables."""

REPLICA = 'model_name=~"$model", instance=~"$replica"'
TENANT = 'tenant=~"$tenant"'
# Of the metrics that are used here, these have a tenant.
_WITH_TENANT = (
    *("deshift_requests_total", "deshift_prompt_tokens_total", "deshift_generation_tokens_total"),
    *("deshift_steering_overhead_seconds", "deshift_steering_overhead_ratio"),
    *("deshift_steering_shift_projection", "deshift_steering_skipped_total"),
    *("deshift_steering_alpha", "deshift_policy_info", "deshift_policy_revision"),
)


def select(metric: str, matchers: str = "") -> str:
    """The series of a metric; matchers: more than the variables, e.g. `mode="off"`."""
    name = metric
    for suffix in ("_bucket", "_sum", "_count"):
        name = name.removesuffix(suffix)
    parts = (REPLICA, TENANT if name in _WITH_TENANT else "", matchers)
    return f"{metric}{{{', '.join(part for part in parts if part)}}}"


def rate(metric: str, matchers: str = "") -> str:
    return f"rate({select(metric, matchers)}[$__rate_interval])"


def over_range(metric: str, matchers: str = "") -> str:
    """How much a counter grew within the time that is shown."""
    return f"increase({select(metric, matchers)}[$__range])"


def total(expression: str, by: str = "") -> str:
    """by: label names with commas; without any one sum of all."""
    return f"sum by ({by}) ({expression})" if by else f"sum({expression})"


def mean(histogram: str, by: str = "", matchers: str = "") -> str:
    """Of what was observed; nothing where nothing was, so that no 0 / 0 is drawn."""
    of_sum = total(rate(f"{histogram}_sum", matchers), by)
    return f"{of_sum} / ({total(rate(f'{histogram}_count', matchers), by)} > 0)"


def quantile(q: str, histogram: str, by: str = "", matchers: str = "") -> str:
    """q: a number or a variable."""
    buckets = total(rate(f"{histogram}_bucket", matchers), f"le, {by}" if by else "le")
    return f"histogram_quantile({q}, {buckets})"


def quantile_over_range(q: str, histogram: str, by: str) -> str:
    """For tables: over all the time that is shown."""
    return f"histogram_quantile({q}, {total(over_range(f'{histogram}_bucket'), f'le, {by}')})"


def hit_share(hits: str, misses: str, by: str = "", matchers: str = "") -> str:
    """Of two counters, hits over both."""
    found = total(rate(hits, matchers), by)
    return f"{found} / ({found} + {total(rate(misses, matchers), by)} > 0)"


def or_zero(expression: str) -> str:
    """For one number that is absent until it has happened."""
    return f"({expression} or vector(0))"


def named(expression: str) -> str:
    """With the replica's own name beside its address; expression: one series per replica."""
    join = "* on (model_name, instance) group_left (replica)"
    return f"{expression} {join} {select('deshift_replica_info')}"
