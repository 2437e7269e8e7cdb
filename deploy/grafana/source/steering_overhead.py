"""What steering costs, how strong it is, and which requests get it."""

from deploy.grafana.source.board import QUANTILE, Board
from deploy.grafana.source.panels import (
    BAD,
    GOOD,
    WARN,
    heatmap,
    stat,
    steps,
    table,
    target,
    timeseries,
)
from deploy.grafana.source.queries import (
    hit_share,
    mean,
    or_zero,
    over_range,
    quantile,
    quantile_over_range,
    rate,
    select,
    total,
)
from deploy.grafana.source.shared import EXEMPLARS, distribution, kill_switch, quantiles

SECONDS, RATIO = "deshift_steering_overhead_seconds", "deshift_steering_overhead_ratio"
STAGE, DOSE = "deshift_steering_stage_seconds", "deshift_steering_relative_dose"
PROJECTION, SKIPPED = "deshift_steering_shift_projection", "deshift_steering_skipped_total"
HITS, MISSES = "deshift_prefix_cache_hit_tokens_total", "deshift_prefix_cache_miss_tokens_total"
WITH_PICTURES = 'reason!="text-only"'
BUDGET = "deshift:steering_overhead_budget:ratio"
OF_MODE = "{{mode}} "


def dashboard() -> Board:
    board = Board(
        "deshift-steering-overhead",
        "Deshift / Steering overhead",
        "What giving back the language model's safety behaviour costs, by tenant and mode.",
        QUANTILE,
    )
    _glance(board)
    _cost(board)
    _stages(board)
    _strength(board)
    _steered(board)
    _sample_level(board)
    return board


def _steered_share(by: str = "") -> str:
    """Of finished requests with pictures; of series that are absent where nothing happened yet."""
    steered = total(rate(f"{SECONDS}_count"), by)
    skipped = total(rate(SKIPPED, WITH_PICTURES), by)
    none = f"({skipped} or 0 * {steered})" if by else or_zero(skipped)
    some = f"({steered} or 0 * {skipped})" if by else or_zero(steered)
    return f"{some} / ({some} + {none} > 0)"


def _glance(board: Board) -> None:
    board.row("What does steering cost right now?")
    share = steps((0.05, WARN), (0.25, BAD))
    board.add(
        *(4, 4),
        stat(
            "Share of a request's time, median",
            "Overhead of a steered request over its end-to-end time; half of them pay less.",
            *("percentunit", quantile("0.5", RATIO)),
            thresholds=share,
        ),
        stat(
            "Share of a request's time, p95",
            "Of 20 steered requests, one pays more than this share of its end-to-end time.",
            *("percentunit", quantile("0.95", RATIO)),
            thresholds=share,
        ),
        stat(
            "Overhead, p95",
            "Seconds that steering adds to a request: the extra prompts, the subtractions, the "
            "taking of vectors and the policy, together.",
            *("s", quantile("0.95", SECONDS)),
        ),
        stat(
            "Requests with pictures that were steered",
            "Of those that finished. Below 100 %: see 'Why requests with pictures were not "
            "steered'.",
            *("percentunit", _steered_share()),
            thresholds=steps((0.99, GOOD), first=WARN),
        ),
        stat(
            "Tenants steered with alpha > 0",
            "Tenants whose pictures get alpha > 0 on some replica; 'other' tenants without a label "
            "of their own are not counted.",
            *("none", or_zero(f"count(max by (tenant) ({select('deshift_steering_alpha')}) > 0)")),
        ),
        kill_switch(),
    )


def _cost(board: Board) -> None:
    board.row("Cost by mode and tenant")
    board.add(
        *(12, 9),
        timeseries(
            "Overhead by mode",
            "Seconds that steering adds to a request, by what was applied: p50, p95, p99."
            + EXEMPLARS,
            "s",
            *quantiles(SECONDS, "mode", OF_MODE, exemplars=True),
        ),
        timeseries(
            "Share of the request's time by mode",
            "Overhead over end-to-end time of each request: p50, p95, p99; and the budget that the "
            "alert DeshiftSteeringOverheadHigh holds the mean to.",
            "percentunit",
            *quantiles(RATIO, "mode", OF_MODE),
            target(BUDGET, "{{mode}} budget"),
        ),
        timeseries(
            "Overhead by tenant and mode (${quantile:text})",
            "Seconds that steering adds to a request, at the quantile chosen above.",
            "s",
            target(quantile("$quantile", SECONDS, "tenant, mode"), "{{tenant}} {{mode}}"),
        ),
        timeseries(
            "Share of the request's time by tenant and mode (${quantile:text})",
            "Overhead over end-to-end time of each request, at the quantile chosen above.",
            "percentunit",
            target(quantile("$quantile", RATIO, "tenant, mode"), "{{tenant}} {{mode}}"),
        ),
    )
    by = "tenant, mode"
    board.add(
        *(14, 9),
        table(
            "Tenants over the time shown",
            "Steered requests that finished within the time shown, and what steering cost them.",
            {"tenant": "Tenant", "mode": "Mode"},
            {
                "Requests": (f"round({total(over_range(f'{SECONDS}_count'), by)}) > 0", "short"),
                "p50": (quantile_over_range("0.5", SECONDS, by), "s"),
                "p95": (quantile_over_range("0.95", SECONDS, by), "s"),
                "p99": (quantile_over_range("0.99", SECONDS, by), "s"),
                "Share p50": (quantile_over_range("0.5", RATIO, by), "percentunit"),
                "Share p95": (quantile_over_range("0.95", RATIO, by), "percentunit"),
                "Share p99": (quantile_over_range("0.99", RATIO, by), "percentunit"),
            },
            sort_by="p95",
        ),
    )
    board.add(
        *(10, 9),
        heatmap(
            "Overhead, distribution",
            "How many requests paid how much." + EXEMPLARS,
            *("s", distribution(SECONDS)),
            exemplars=True,
        ),
    )


def _stages(board: Board) -> None:
    board.row("Where it arises")
    requests = f"on () group_left () ({total(rate(f'{DOSE}_count'))} > 0)"
    board.add(
        *(12, 8),
        timeseries(
            "Mean overhead of a request by stage",
            "shift: passes of the sample level's two extra prompts; inject: subtracting in every "
            "pass; store: taking the vectors from memory (requests never wait for the store); "
            "admission: policy, plan and making the two prompts. Of all tenants.",
            "s",
            target(f"{total(rate(f'{STAGE}_sum'), 'stage')} / {requests}", "{{stage}}"),
            is_stacked=True,
        ),
        timeseries(
            "Overhead by mode and stage (${quantile:text})",
            "Seconds of each stage in a request, at the quantile chosen above. Of all tenants.",
            "s",
            target(quantile("$quantile", STAGE, "mode, stage"), "{{mode}} {{stage}}"),
        ),
    )


def _strength(board: Board) -> None:
    board.row("Strength in force, and what it meets")
    alpha = select("deshift_steering_alpha")
    board.add(
        *(12, 9),
        timeseries(
            "Alpha in force",
            "What the tenant's pictures get: 0 when off, killed or expired to 0. Of replicas that "
            "do not agree, the highest; lines mark changes of policies.",
            "none",
            target(f"max by (tenant) ({alpha})", "{{tenant}}"),
            is_stepped=True,
        ),
        table(
            "Policies in force",
            "Two lines of one tenant: its replicas do not agree (yet).",
            {"tenant": "Tenant", "mode": "Mode", "method": "Method", "schedule": "Schedule"},
            {
                "Policy": (
                    f"max by (tenant, mode, method, schedule) ({select('deshift_policy_info')})",
                    "",
                ),
                "Alpha": (f"max by (tenant) ({alpha})", "none"),
                "Revision": (f"max by (tenant) ({select('deshift_policy_revision')})", "none"),
            },
            sort_by="Tenant",
        ),
    )
    board.add(
        *(8, 8),
        timeseries(
            "Relative dose by mode",
            "Largest alpha * |Delta| / |h| over the layers of a request: p50, p95, p99. Compares "
            "across models; towards 1 they babble. Of all tenants.",
            "percentunit",
            *quantiles(DOSE, "mode", OF_MODE),
        ),
        heatmap(
            "Relative dose, distribution",
            "How many requests got which dose. Of all tenants.",
            "percentunit",
            distribution(DOSE),
        ),
        timeseries(
            "Shift of the traffic by tenant (${quantile:text})",
            "How far prompts with pictures lie from text before steering, where it was probed "
            "(DESHIFT_PROBE_SHARE): 0 like text, 1 as far as a picture without content moves them.",
            "none",
            target(quantile("$quantile", PROJECTION, "tenant"), "{{tenant}}"),
        ),
    )


def _steered(board: Board) -> None:
    board.row("What was steered, and why not the rest")
    board.add(
        *(8, 8),
        timeseries(
            "Requests with pictures by what was applied",
            "That finished. not steered: nothing was subtracted, by the reasons beside.",
            "reqps",
            target(total(rate(f"{SECONDS}_count"), "mode"), "{{mode}}"),
            target(or_zero(total(rate(SKIPPED, WITH_PICTURES))), "not steered"),
            is_stacked=True,
        ),
        timeseries(
            "Why requests with pictures were not steered",
            "The reason as in the answer; requests without pictures (text-only) are left out.",
            "reqps",
            target(total(rate(SKIPPED, WITH_PICTURES), "reason"), "{{reason}}"),
            is_stacked=True,
        ),
        timeseries(
            "Share of requests with pictures that were steered, by tenant",
            "Of those that finished.",
            "percentunit",
            target(_steered_share("tenant"), "{{tenant}}"),
            top=1,
        ),
    )


def _sample_level(board: Board) -> None:
    board.row("The sample level's extra prompts")
    prefill = "deshift_engine_prefill_tokens_total"
    board.add(
        *(8, 8),
        timeseries(
            "Prompt tokens that the prefix cache had",
            "shift: of the two extra prompts, whose beginnings repeat (that is what makes the "
            "sample level cheap); own: of the requests' own prompts.",
            "percentunit",
            target(hit_share(HITS, MISSES, "prompt"), "{{prompt}}"),
            top=1,
        ),
        timeseries(
            "Prompt tokens computed",
            "By whose they were: own prompts, the pairs of extra prompts (shift), and probes.",
            "short",
            target(total(rate(prefill), "prompt"), "{{prompt}} per second"),
            is_stacked=True,
        ),
        timeseries(
            "Mean time of the two extra passes",
            "Per request at the sample level. Of all tenants.",
            "s",
            target(mean(STAGE, "", 'stage="shift"'), "shift"),
        ),
    )
