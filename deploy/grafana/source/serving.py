"""What clients get, and what the engine does for it."""

from deploy.grafana.source.board import Board
from deploy.grafana.source.panels import (
    BAD,
    QUANTILES,
    WARN,
    colors,
    heatmap,
    stat,
    steps,
    target,
    timeseries,
)
from deploy.grafana.source.queries import hit_share, or_zero, quantile, rate, select, total
from deploy.grafana.source.shared import EXEMPLARS, distribution, quantiles

REQUESTS = "deshift_requests_total"
TTFT, E2E = "deshift_time_to_first_token_seconds", "deshift_e2e_request_latency_seconds"
GAP, STEP = "deshift_inter_token_latency_seconds", "deshift_engine_step_seconds"
RUNNING, MAX_ROWS = "deshift_num_requests_running", "deshift_max_rows"
WAITING, MAX_QUEUE = "deshift_num_requests_waiting", "deshift_max_queue"
FAILED = 'outcome=~"error|timeout|unavailable"'
SERVED = 'outcome=~"success|error|timeout|unavailable"'
OUTCOMES = {
    "success": "green",
    "cancelled": "blue",
    "invalid": "purple",
    "unauthorized": "light-purple",
    "limited": "yellow",
    "timeout": "orange",
    "unavailable": "red",
    "error": "dark-red",
}


def dashboard() -> Board:
    board = Board(
        "deshift-serving",
        "Deshift / Serving",
        "Latency, throughput, queue, caches and errors. Latencies are of all tenants.",
    )
    _glance(board)
    _latency(board)
    _throughput(board)
    _load(board)
    _caches(board)
    _engine(board)
    return board


def _failed_share() -> str:
    failed = or_zero(total(rate(REQUESTS, FAILED)))
    return f"{failed} / ({total(rate(REQUESTS, SERVED))} > 0)"


def _glance(board: Board) -> None:
    board.row("At a glance")
    rows = f"sum({select(RUNNING)}) / sum({select(MAX_ROWS)})"
    queue = f"max({select(WAITING)} / {select(MAX_QUEUE)})"
    board.add(
        *(4, 4),
        stat(
            "Requests",
            "Chat requests that ended, whatever their outcome.",
            *("reqps", total(rate(REQUESTS))),
        ),
        stat(
            "Time to first token, p95",
            "From a request's arrival, queueing included.",
            *("s", quantile("0.95", TTFT)),
            thresholds=steps((5, WARN), (20, BAD)),
        ),
        stat(
            "Between tokens, p95",
            "Gap between the tokens of one answer; 0.2 s is about the pace of reading.",
            *("s", quantile("0.95", GAP)),
            thresholds=steps((0.2, WARN), (0.5, BAD)),
        ),
        stat(
            "Rows in use",
            "Requests in the engine's rows over the limit of all replicas shown. A request with n "
            "choices takes n rows, so it may be full below 100 %.",
            *("percentunit", rows),
            thresholds=steps((0.8, WARN), (1, BAD)),
        ),
        stat(
            "Queue in use",
            "Waiting requests over the limit, on the fullest replica; at 100 % requests get 429.",
            *("percentunit", queue),
            thresholds=steps((0.5, WARN), (0.8, BAD)),
        ),
        stat(
            "Requests that failed",
            "Errors, timeouts and 503 over these and successes; not what clients caused.",
            *("percentunit", _failed_share()),
            thresholds=steps((0.01, WARN), (0.05, BAD)),
        ),
    )


def _latency(board: Board) -> None:
    board.row("Latency")
    board.add(
        *(8, 8),
        timeseries(
            "Time to first token",
            "From a request's arrival to its first token, queueing included." + EXEMPLARS,
            "s",
            *quantiles(TTFT, exemplars=True),
        ),
        timeseries(
            "Between tokens",
            "Gaps between the tokens of one sequence; the first token is not counted.",
            "s",
            *quantiles(GAP),
        ),
        timeseries(
            "End to end",
            "From a finished request's arrival to its last byte." + EXEMPLARS,
            "s",
            *quantiles(E2E, exemplars=True),
        ),
        timeseries(
            "Time to first token by what was applied, p95",
            "off: also requests without pictures. sample measures two more prompts first.",
            "s",
            target(quantile("0.95", TTFT, "mode"), "{{mode}}"),
        ),
        heatmap(
            "Time to first token, distribution",
            "How many requests waited how long for their first token." + EXEMPLARS,
            *("s", distribution(TTFT)),
            exemplars=True,
        ),
        timeseries(
            "Prefill by what was applied, p95",
            "From a row in the engine to the first token.",
            "s",
            target(quantile("0.95", "deshift_request_prefill_time_seconds", "mode"), "{{mode}}"),
        ),
    )


def _throughput(board: Board) -> None:
    board.row("Throughput")
    prompt, generated = "deshift_prompt_tokens_total", "deshift_generation_tokens_total"
    board.add(
        *(6, 8),
        timeseries(
            "Requests by outcome",
            "Chat requests that ended. invalid: 400, 404, 413; unauthorized: 401, 403; limited: "
            "429; unavailable: 503; cancelled: the client left.",
            "reqps",
            target(total(rate(REQUESTS), "outcome"), "{{outcome}}"),
            is_stacked=True,
            overrides=colors(OUTCOMES),
        ),
        timeseries(
            "Requests by tenant",
            "Chat requests that ended; other: tenants without a label of their own.",
            "reqps",
            target(total(rate(REQUESTS), "tenant"), "{{tenant}}"),
            is_stacked=True,
        ),
        timeseries(
            "Tokens",
            "Of finished requests, per second.",
            "short",
            target(total(rate(prompt)), "prompt tokens per second"),
            target(total(rate(generated)), "generated tokens per second"),
        ),
        timeseries(
            "Generated tokens by tenant",
            "Of finished requests, per second.",
            "short",
            target(total(rate(generated), "tenant"), "{{tenant}} per second"),
            is_stacked=True,
        ),
    )
    board.add(
        *(24, 7),
        timeseries(
            "Requests that did not succeed, by tenant",
            "Refused, limited, left or failed, per second.",
            "reqps",
            target(
                total(rate(REQUESTS, 'outcome!="success"'), "tenant, outcome"),
                "{{tenant}} {{outcome}}",
            ),
        ),
    )


def _load(board: Board) -> None:
    board.row("Load")
    board.add(
        *(6, 8),
        timeseries(
            "Running requests and rows",
            "Rows that are taken, from a request's prefill on, and how many there are.",
            "short",
            target(total(select(RUNNING)), "running"),
            target(total(select(MAX_ROWS)), "rows"),
        ),
        timeseries(
            "Queue by replica",
            "Requests waiting for a row; the lowest limit of a replica.",
            "short",
            target(total(select(WAITING), "instance"), "{{instance}}"),
            target(f"min({select(MAX_QUEUE)})", "limit"),
        ),
        timeseries(
            "Time in the queue",
            "From the engine's queue to a row.",
            "s",
            *quantiles("deshift_request_queue_time_seconds"),
        ),
        timeseries(
            "KV cache by replica",
            "Tokens reserved for running sequences over the budget; full: requests wait.",
            "percentunit",
            target(total(select("deshift_kv_cache_usage_ratio"), "instance"), "{{instance}}"),
            top=1,
        ),
    )


def _caches(board: Board) -> None:
    board.row("Caches")
    prefix = ("deshift_prefix_cache_hit_tokens_total", "deshift_prefix_cache_miss_tokens_total")
    vision = ("deshift_vision_cache_hit_tokens_total", "deshift_vision_cache_miss_tokens_total")
    used, limit = "deshift_cache_bytes", "deshift_cache_limit_bytes"
    board.add(
        *(8, 8),
        timeseries(
            "Prefix cache: tokens that it had",
            "Of prompt tokens asked for. own: requests' prompts; shift: the sample level's two "
            "extra prompts.",
            "percentunit",
            target(hit_share(*prefix, "prompt"), "{{prompt}}"),
            top=1,
        ),
        timeseries(
            "Vision cache: picture features that it had",
            "Of the features of pictures asked for.",
            "percentunit",
            target(hit_share(*vision), "vision"),
            top=1,
        ),
        timeseries(
            "Size",
            "What the caches hold, and may hold, on all replicas shown.",
            "bytes",
            target(total(select(used), "cache"), "{{cache}}"),
            target(total(select(limit), "cache"), "{{cache}} limit"),
        ),
    )


def _engine(board: Board) -> None:
    board.row("Engine and pictures")
    pictures = {
        "decode pictures": "deshift_image_decode_seconds",
        "prepare prompt": "deshift_prompt_prepare_seconds",
        "vision tower": "deshift_vision_encode_seconds",
    }
    board.add(
        *(8, 8),
        timeseries(
            "Step time by kind",
            "Passes of the engine: decode (running answers), prefill (prompts), mixed (both).",
            "s",
            *(
                target(quantile(QUANTILES[name], STEP, "kind"), "{{kind}} " + name)
                for name in ("p50", "p95")
            ),
        ),
        timeseries(
            "Prompt tokens computed",
            "By whose they were: own prompts, the sample level's extra prompts (shift), probes.",
            "short",
            target(
                total(rate("deshift_engine_prefill_tokens_total"), "prompt"),
                "{{prompt}} per second",
            ),
            is_stacked=True,
        ),
        timeseries(
            "Pictures and prompts, p95",
            "Decoding the pictures of a request, making its prompt (chat template, processor), and "
            "the vision tower's pass for pictures that no cache had.",
            "s",
            *(target(quantile("0.95", metric), name) for name, metric in pictures.items()),
        ),
    )
