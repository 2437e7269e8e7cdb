"""A real Prometheus on a free port of 127.0.0.1, with its data in a directory of the test.

It runs with whatever configuration a test gives it, and answers as Grafana asks: instant queries,
queries over a range, exemplars, targets, rules.
"""

import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.redis_server import free_port, program

NOTHING = "global:\n  scrape_interval: 1s\n"
_START_S = 20.0


class QueryError(Exception):
    """Prometheus refused a query; the text is its own."""


class PrometheusServer:
    """One process; `start` it, or enter it as a context.

    directory: data, log and, where config is text, the configuration file.
    config: a file (rule files beside it are found), or the text of one.
    """

    def __init__(self, directory: Path, config: Path | str = NOTHING) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(config, str):
            path = directory / "prometheus.yml"
            path.write_text(config)
            config = path
        self.directory = directory
        self.config = config
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._client = httpx.Client(base_url=self.url, timeout=30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.directory / "prometheus.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when it answers queries."""
        command = [
            *(program("prometheus"), f"--config.file={self.config}"),
            f"--web.listen-address=127.0.0.1:{self.port}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            "--enable-feature=exemplar-storage",
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"prometheus did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Nothing happens when it does not run."""
        self._client.close()
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=20)
            self._process = None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query now, each with `metric` and `value`.

        A number without labels, e.g. of `1 + 1`, is one series. Raises QueryError.
        """
        data = self._get("query", query=expression)
        if data["resultType"] in ("scalar", "string"):
            return [{"metric": {}, "value": data["result"]}]
        return list(data["result"])

    def syntax_problem(self, expression: str) -> str:
        """Why it cannot be evaluated, empty where it can."""
        try:
            self.query(expression)
        except QueryError as error:
            return str(error)
        return ""

    def query_range(
        self, expression: str, start: float, end: float, step_s: float = 1.0
    ) -> list[dict[str, Any]]:
        """Each series with `metric` and `values`. start, end: Unix time. Raises QueryError."""
        data = self._get("query_range", query=expression, start=start, end=end, step=step_s)
        return list(data["result"])

    def exemplars(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        """Each series of the selectors in an expression that has exemplars, with these."""
        return list(self._get("query_exemplars", query=expression, start=start, end=end))

    def series(self, selector: str, start: float, end: float) -> list[dict[str, str]]:
        """The labels of what a selector finds, also of what has ended by now. Raises QueryError."""
        return list(self._get("series", **{"match[]": selector}, start=start, end=end))

    def label_values(self, label: str, selector: str) -> list[str]:
        """As Grafana's `label_values`."""
        return list(self._get(f"label/{label}/values", **{"match[]": selector}))

    def targets(self) -> list[dict[str, Any]]:
        """The active ones, each with `health` and `lastError`."""
        return list(self._get("targets", state="active")["activeTargets"])

    def rules(self) -> list[dict[str, Any]]:
        """Every rule of every group, each with `health` and `lastError`."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **parameters: Any) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        if answer["status"] != "success":
            raise QueryError(f"{answer['error']}: {parameters}")
        return answer["data"]

    def _is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False
