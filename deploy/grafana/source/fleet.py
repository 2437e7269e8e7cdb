"""The replicas, the store that they share, and whether all of them steer by the same policy."""

from deploy.grafana.source.board import Board
from deploy.grafana.source.panels import (
    BAD,
    GOOD,
    WARN,
    Json,
    stat,
    states,
    steps,
    table,
    target,
    timeline,
    timeseries,
)
from deploy.grafana.source.queries import named, over_range, quantile, rate, select, total
from deploy.grafana.source.shared import kill_switch

INFO, READY, DRAINING = "deshift_replica_info", "deshift_ready", "deshift_draining"
REVISION, AGE = "deshift_store_revision", "deshift_policy_age_seconds"
UP, FOREIGN = "deshift_store_up", "deshift_store_foreign"
CALLS, CALL_ERRORS = "deshift_store_operation_seconds", "deshift_store_errors_total"
FAILURES, CANARY = "deshift_engine_failures_total", "deshift_canary_passed"
VECTORS, PROBLEM = "deshift_vectors_info", "deshift_vectors_problem"
KILL, TENANTS = "deshift_kill_switch", "deshift_tenants"
OF_REPLICA = "{{replica}}"
YES_NO = states(_1=("yes", GOOD), _0=("no", BAD))
NO_YES = states(_0=("no", GOOD), _1=("yes", BAD))
NONE_IS_GOOD = steps((1, BAD))


def dashboard() -> Board:
    board = Board(
        "deshift-fleet",
        "Deshift / Fleet",
        "Replicas, what is in force on each, the store, vectors, and steering's own checks.",
    )
    _glance(board)
    _replicas(board)
    _policies(board)
    _store(board)
    _steering(board)
    _resources(board)
    return board


def _glance(board: Board) -> None:
    board.row("At a glance")
    was_here = f"last_over_time({select(INFO)}[1h])"
    hooks = select(FAILURES, 'kind="hooks"')
    steps_failed = select(FAILURES, 'kind="steps"')
    board.add(
        *(4, 4),
        stat(
            "Replicas",
            "That Prometheus reaches now.",
            *("none", f"count({select(INFO)})"),
        ),
        stat(
            "Not ready",
            "Replicas whose /ready does not answer 200.",
            *("none", f"sum(1 - {select(READY)})"),
            thresholds=NONE_IS_GOOD,
        ),
        stat(
            "Gone within the hour",
            "Replicas reached within the last hour and not now: lost, or scaled down.",
            *("none", f"count({was_here}) - count({select(INFO)})"),
            thresholds=steps((1, WARN)),
        ),
        stat(
            "Revisions between replicas",
            "How far the replica that is last lies behind the first; more than 0 for longer than "
            "the sync interval: a replica does not follow the store.",
            *("none", f"max({select(REVISION)}) - min({select(REVISION)})"),
            thresholds=steps((1, WARN)),
        ),
        stat(
            "Oldest policy",
            "Since the store last confirmed what is in force, on the replica that waits longest.",
            *("s", f"max({select(AGE)})"),
            thresholds=steps((30, WARN), (300, BAD)),
        ),
        stat(
            "Without the store",
            "Replicas that do not reach it; the last good policies stay in force there.",
            *("none", f"sum(1 - {select(UP)})"),
            thresholds=NONE_IS_GOOD,
        ),
        stat(
            "Vector problems",
            "Aliases that a replica cannot follow; the last good set stays in force there.",
            *("none", f"sum({select(PROBLEM)})"),
            thresholds=NONE_IS_GOOD,
        ),
        stat(
            "Canary failed",
            "Replicas whose check of steering at start failed; they are not ready.",
            *("none", f"sum(1 - {select(CANARY)})"),
            thresholds=NONE_IS_GOOD,
        ),
        stat(
            "Steering without its turn",
            "Passes in which steering did not run at every layer, since the replicas started. More "
            "than 0: those requests failed, and nobody should trust the replica.",
            *("none", f"sum({hooks})"),
            thresholds=NONE_IS_GOOD,
        ),
        stat(
            "Engine steps that broke",
            "Since the start of the replicas seen within the last hour.",
            *("none", f"sum(max_over_time({steps_failed}[1h]))"),
            thresholds=steps((1, WARN)),
        ),
        kill_switch(),
        stat(
            "Tenants",
            "With a policy from the store, on the replica that knows most.",
            *("none", f"max({select(TENANTS)})"),
        ),
    )


def _replicas(board: Board) -> None:
    board.row("Replicas")
    labels = {
        "replica": "Replica",
        "instance": "Address",
        "model_name": "Model",
        "version": "Version",
        "device": "Device",
        "dtype": "Format",
    }
    board.add(
        *(14, 8),
        table(
            "What each replica is and follows",
            "Replicas that Prometheus reaches now.",
            labels,
            {
                "Info": (f"max by ({', '.join(labels)}) ({select(INFO)})", ""),
                "Ready": (f"max by (instance) ({select(READY)})", "none"),
                "Revision": (f"max by (instance) ({select(REVISION)})", "none"),
                "Policy age": (f"max by (instance) ({select(AGE)})", "s"),
                "Running": (
                    f"max by (instance) ({select('deshift_num_requests_running')})",
                    "short",
                ),
            },
            sort_by="Replica",
            mappings={"Ready": YES_NO},
        ),
    )
    board.add(
        *(10, 8),
        timeline(
            "Ready",
            "Whether /ready answers 200; draining: it refuses new requests to shut down.",
            states(_1=("ready", GOOD), _0=("not ready", BAD), _2=("draining", WARN)),
            target(
                named(f"({select(READY)} + 2 * {select(DRAINING)} * (1 - {select(READY)}))"),
                OF_REPLICA,
            ),
        ),
    )


def _each(metric: str) -> Json:
    return target(named(select(metric)), OF_REPLICA)


def _policies(board: Board) -> None:
    board.row("What is in force")
    ages = steps((30, WARN), (300, BAD))
    board.add(
        *(8, 8),
        timeseries(
            "Revision in force by replica",
            "Newest revision of the store that the replica follows; lines that stay apart: a "
            "replica is behind.",
            *("none", _each(REVISION)),
            is_stepped=True,
            bottom=None,
        ),
        timeseries(
            "Age of the policies by replica",
            "Since the store last confirmed what is in force. It grows while the store is lost.",
            *("s", _each(AGE)),
            thresholds=ages,
        ),
        timeseries(
            "Tenants and documents",
            "Tenants with a policy from the store, and documents of the store that cannot be read, "
            "on the replica with most.",
            "none",
            target(f"max({select(TENANTS)})", "tenants"),
            target(f"max({select('deshift_documents_unreadable')})", "unreadable documents"),
            is_stepped=True,
        ),
    )


def _store(board: Board) -> None:
    board.row("Store")
    board.add(
        *(6, 8),
        timeline(
            "Store by replica",
            "foreign: it holds other data than what is in force, e.g. after the loss of its disk.",
            states(_1=("ok", GOOD), _0=("unreachable", BAD), _2=("foreign", BAD)),
            target(named(f"({select(UP)} + {select(FOREIGN)})"), OF_REPLICA),
        ),
        timeseries(
            "Calls of the store, p95",
            "read, heartbeat and vectors are the replica's own; commit, audit and replicas are for "
            "operators. Requests wait for none of them.",
            "s",
            target(quantile("0.95", CALLS, "operation"), "{{operation}}"),
        ),
        timeseries(
            "Calls of the store",
            "Per second, by operation.",
            "ops",
            target(total(rate(f"{CALLS}_count"), "operation"), "{{operation}}"),
        ),
        timeseries(
            "Calls that failed",
            "Or did not end in time, per second.",
            "ops",
            target(total(rate(CALL_ERRORS), "operation"), "{{operation}}"),
        ),
    )


def _steering(board: Board) -> None:
    board.row("Vectors, canary, kill switch")
    board.add(
        *(12, 8),
        table(
            "Vector sets in force",
            "By alias; two lines of one alias: replicas do not agree (yet).",
            {"alias": "Alias", "vector_id": "Vector set"},
            {
                "Replicas": (f"count by (alias, vector_id) ({select(VECTORS)})", "none"),
                "With a problem": (f"sum by (alias) ({select(PROBLEM)})", "none"),
            },
            sort_by="Alias",
        ),
    )
    worst = f"max by (alias, instance) ({select(PROBLEM)})"
    by_alias = f"{worst} * on (instance) group_left (replica) {select(INFO)}"
    board.add(
        *(12, 8),
        timeline(
            "Vector problems by replica and alias",
            "yes: the alias cannot be followed there; the last good set stays in force, or nothing "
            "is answered where there was none. What is wrong: /ready.",
            NO_YES,
            target(by_alias, "{{replica}} {{alias}}"),
        ),
    )
    board.add(
        *(8, 8),
        timeline(
            "Canary by replica",
            "The check at start that alpha 0 is a no-op and alpha 1 moves every layer by the "
            "planned amount.",
            states(_1=("passed", GOOD), _0=("failed", BAD)),
            _each(CANARY),
        ),
        timeline(
            "Kill switch by action",
            "On at least one of the replicas shown.",
            states(_0=("off", GOOD), _1=("on", BAD)),
            target(f"max by (action) ({select(KILL)})", "{{action}}"),
        ),
        timeseries(
            "Engine failures",
            "Within the time shown up to now. steps: passes that broke; hooks: passes in which "
            "steering did not have its turn.",
            "none",
            target(total(over_range(FAILURES), "kind"), "{{kind}}"),
        ),
    )


def _resources(board: Board) -> None:
    board.row("Resources")

    def of_process(metric: str) -> Json:
        """The process' own metrics have no model: they are narrowed by the replica's."""
        info = f"max by (instance, replica) ({select(INFO)})"
        return target(f"{metric} * on (instance) group_left (replica) {info}", OF_REPLICA)

    board.add(
        *(8, 8),
        timeseries(
            "Processor time by replica",
            "Cores that the process keeps busy.",
            "short",
            of_process('rate(process_cpu_seconds_total{instance=~"$replica"}[$__rate_interval])'),
        ),
        timeseries(
            "Memory by replica",
            "Resident, of the process; the accelerator's memory is not in it.",
            "bytes",
            of_process('process_resident_memory_bytes{instance=~"$replica"}'),
        ),
        timeseries(
            "HTTP requests in flight by replica",
            "Of clients, being answered.",
            *("short", _each("deshift_http_requests_in_flight")),
        ),
    )
