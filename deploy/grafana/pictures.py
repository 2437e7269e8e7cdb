"""Draw the README's pictures: panels of the dashboards over the data of a run, and the console.

    python -m deploy.grafana.pictures --out deploy/pictures --minutes 6

Starts two replicas of the demonstration over a Redis, with three tenants, and a Prometheus with the
deployed configuration and rules that scrapes every 2 s; drives a mixed load; sets a tenant's alpha
live and back; asks Prometheus for the dashboards' own expressions, and draws these panels in
Grafana's manner. No Grafana takes part. Exits with 1 and names the panels where any was empty.

Needs the programs redis-server, prometheus and chromium, and `pip install -e '.[dev,eval]'`. The
first run builds the demonstration model. `--keep DIR` keeps logs and data.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from deploy.grafana.build import FOLDER
from deploy.grafana.drawing.board import drawn
from deploy.grafana.drawing.console import save_console
from deploy.grafana.drawing.load import driven
from deploy.grafana.drawing.results import Json, PictureError, Prometheus, Result, Window
from deploy.grafana.drawing.site import SCRAPE_S, Site, running
from server.bench.target import BenchError
from server.errors import ServerError
from server.process import ChildError
from steering.errors import SteeringError

Rows = Sequence[Sequence[str]]
CHOSEN: Mapping[str, Rows] = {
    "steering-overhead": (
        (
            "Share of a request's time, median",
            "Share of a request's time, p95",
            "Overhead, p95",
            "Requests with pictures that were steered",
            "Tenants steered with alpha > 0",
            "Kill switch",
        ),
        ("Overhead by mode", "Share of the request's time by mode"),
        ("Mean overhead of a request by stage", "Alpha in force"),
        ("Tenants over the time shown", "Overhead, distribution"),
        (
            "Relative dose by mode",
            "Shift of the traffic by tenant (${quantile:text})",
            "Prompt tokens that the prefix cache had",
        ),
    ),
    "serving": (
        (
            "Requests",
            "Time to first token, p95",
            "Between tokens, p95",
            "Rows in use",
            "Queue in use",
            "Requests that failed",
        ),
        ("Time to first token", "Between tokens"),
        ("Requests by outcome", "Generated tokens by tenant"),
        (
            "Time to first token by what was applied, p95",
            "Time to first token, distribution",
            "Running requests and rows",
        ),
        ("Step time by kind", "Size", "Pictures and prompts, p95"),
    ),
    "fleet": (
        (
            "Replicas",
            "Not ready",
            "Revisions between replicas",
            "Oldest policy",
            "Without the store",
            "Canary failed",
        ),
        ("What each replica is and follows", "Ready"),
        ("Store by replica", "Canary by replica", "Kill switch by action"),
        (
            "Revision in force by replica",
            "Age of the policies by replica",
            "Calls of the store, p95",
        ),
        ("Processor time by replica", "Memory by replica", "HTTP requests in flight by replica"),
    ),
}
# Grafana's, for the deployed scrape interval of 15 s.
RATE_INTERVAL = "1m"
STRONGER, REASON = 0.3, "stronger for the pilot"
_TOLD = (BenchError, ChildError, PictureError, ServerError, SteeringError)
_WARM_UP_S = 5 * SCRAPE_S


def board_of(name: str) -> Json:
    board: Json = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return board


def window_of(start: float, end: float) -> Window:
    """Everything of model, replicas and tenants, as the dashboards are at first."""
    every = {name: (".+", "All") for name in ("model", "replica", "tenant")}
    length = f"{round(end - start)}s"
    variables = {
        **every,
        "quantile": ("0.95", "p95"),
        "__rate_interval": (RATE_INTERVAL, RATE_INTERVAL),
        "__range": (length, length),
    }
    step_s = max(SCRAPE_S, round((end - start) / 180))
    return Window(start, end, step_s, variables)


def results(prometheus: Prometheus, name: str, window: Window) -> list[list[Result]]:
    """Of the chosen panels of a dashboard. Raises PictureError, KeyError for an unknown title."""
    board = board_of(name)
    panels = {panel["title"]: panel for panel in board["panels"] if panel["type"] != "row"}
    changes = prometheus.changes(board, window)
    return [
        [prometheus.result(panels[title], window, changes) for title in row] for row in CHOSEN[name]
    ]


def draw_all(prometheus: Prometheus, window: Window, out: Path) -> list[str]:
    """Write a picture of each dashboard; returns which panels were empty."""
    empty = []
    for name in CHOSEN:
        rows = results(prometheus, name, window)
        drawn(board_of(name)["title"], rows).save_png(out / f"{name}.png")
        empty += [f"{name}: {each.title}" for row in rows for each in row if each.is_empty]
    return empty


def observe(site: Site, seconds: float, out: Path) -> Window:
    """Drive it; the operator's changes come after a third and two thirds of the time. Returns what
    to draw."""
    with driven(site) as statuses:
        time.sleep(_WARM_UP_S)
        start = time.time()
        for alpha, reason in ((STRONGER, REASON), (0.2, "back: the pilot is over")):
            time.sleep(seconds / 3)
            site.set_alpha(alpha, reason)
        time.sleep(seconds / 3)
        save_console(site, out / "console.png")
        end = time.time()
    told = ", ".join(f"{status}: {num}" for status, num in sorted(statuses.items()))
    print(f"answers by status: {told}")
    return window_of(start, end)


def status(empty: Sequence[str]) -> int:
    """1 where panels were empty, which are named."""
    if empty:
        print("empty panels:", *empty, sep="\n  ", file=sys.stderr)
    return 1 if empty else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the README's pictures from a run.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the pictures.")
    parser.add_argument("--minutes", type=float, default=6.0, help="Of load that is shown.")
    parser.add_argument("--keep", type=Path, help="New folder for logs and data, which stays.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            folder = options.keep or Path(stack.enter_context(TemporaryDirectory()))
            site = stack.enter_context(running(folder))
            window = observe(site, 60 * options.minutes, options.out)
            client = stack.enter_context(httpx.Client(base_url=site.prometheus, timeout=60))
            empty = draw_all(Prometheus(client), window, options.out)
    except (*_TOLD, httpx.HTTPError) as error:
        print(f"no pictures: {error}", file=sys.stderr)
        return 1
    return status(empty)


if __name__ == "__main__":
    sys.exit(main())
