"""What `deshift eval` and `deshift calibrate` are asked for, and the server that they ask."""

import contextlib
import hashlib
import importlib.util
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from server.errors import ServerError
from steering.errors import EvaluationError

if TYPE_CHECKING:  # what it imports takes seconds
    from steering.evaluate.evaluation import Evaluation

_SERVED = "eval-server"
_EXTRA = ("matplotlib", "scipy", "tenacity")


@dataclass(frozen=True)
class Connection:
    url: str
    api_key: str | None
    model: str | None
    concurrency: int


@dataclass(frozen=True)
class Place:
    """Which server: a URL, or one that is started here with settings of its own.

    Raises EvaluationError unless it is one.
    """

    url: str | None
    demo: bool
    serve: Path | None
    settings: tuple[tuple[str, str], ...]
    dtype: str
    logs: Path

    def __post_init__(self) -> None:
        if sum((self.url is not None, self.demo, self.serve is not None)) != 1:
            raise EvaluationError("which server? Give one of --url, --demo and --serve")
        if self.url is not None and self.settings:
            raise EvaluationError("--setting is for a server that is started here, not for --url")

    def setup(self) -> str | None:
        """A digest of how a server is started here: other numbers or settings, other answers."""
        if self.url is not None:
            return None
        return hashlib.sha256(json.dumps([self.dtype, sorted(self.settings)]).encode()).hexdigest()

    def options(self) -> str:
        """What was asked for, to be kept with the run: a setting's value may be a secret."""
        if self.url is not None:
            return shlex.join(["--url", self.url])
        served = ["--demo"] if self.serve is None else ["--serve", str(self.serve)]
        settings = [f"--setting {name}=..." for name, _ in self.settings]
        return " ".join([shlex.join([*served, "--dtype", self.dtype]), *settings])


def evaluation_of(
    suites: Sequence[str],
    conditions: Sequence[str],
    conditions_set: str | None,
    folder: Path | None,
    num: int | None,
    skips: Mapping[str, int],
    seed: int,
    max_tokens: int,
) -> "Evaluation":
    """Everything that can be wrong before a server is started is found here."""
    from steering.evaluate import conditions as known
    from steering.evaluate.evaluation import Evaluation, Sampling
    from steering.evaluate.pictures import check, photos
    from steering.evaluate.suites import read_suites

    if conditions_set not in (None, "table"):
        raise EvaluationError(f"--conditions-set {conditions_set!r}: there is `table` only")
    chosen = known.parse_all(conditions, table=conditions_set == "table")
    if not suites:
        raise EvaluationError("nothing to ask: give --suite")
    found = read_suites(suites, num, seed, lambda name: skips.get(name, skips.get("", 0)))
    names = [each.name for each in found]
    if unknown := skips.keys() - {"", *names}:
        raise EvaluationError(f"--skip names no suite of this run: {', '.join(sorted(unknown))}")
    check([item for each in found for item in each.items])
    for each in found:
        if num is not None and len(each.items) < num:
            typer.echo(f"{each.name}: {len(each.items)} prompts, fewer than --num {num}", err=True)
    pictures = photos(folder)
    dealt = tuple(pictures.dealt(each, seed) for each in found)
    evaluation = Evaluation(dealt, tuple(chosen), pictures, Sampling(max_tokens, seed))
    evaluation.asked()
    return evaluation


def started(
    stack: contextlib.ExitStack, place: Place, evaluation: "Evaluation", concurrency: int
) -> tuple[str, "Evaluation"]:
    """The URL, and the evaluation of what a server that is started here serves.

    Raises ServerError.
    """
    if place.url is not None:
        return place.url, evaluation
    from server.bench import machine, servers
    from server.bench.target import BenchError
    from server.config import PREFIX
    from server.process import ChildError

    env = {}
    if all(condition.name != "served" for condition in evaluation.conditions):
        # Every request says how it is to be steered, so that none needs a policy's vectors.
        env[f"{PREFIX}STEERING_MODE"] = "off"
    try:
        checkpoint = servers.checkpoint(place.serve, place.demo, None)
        assert checkpoint is not None
        env |= checkpoint.environment(concurrency, place.settings)
        typer.echo(f"Starting the server (its log: {place.logs / _SERVED}.log)", err=True)
        served = servers.deshift_serve(_SERVED, checkpoint.model, place.logs, place.dtype, env)
        target = stack.enter_context(served)
    except (BenchError, ChildError) as error:
        raise ServerError(str(error)) from None
    digest = machine.checkpoint_digest(checkpoint.model)
    return target.url, replace(evaluation, checkpoint=digest, setup=place.setup())


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """While a server is asked: whoever stops it hears how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped; what was answered is in {out}: go on with --resume", err=True)
        raise typer.Exit(130) from None


def check_installed() -> None:
    """Raises EvaluationError, naming the extra that has what is missing."""
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise EvaluationError(f"{', '.join(missing)} missing: pip install 'deshift[eval]'")


def skips_of(values: Sequence[str] | None) -> dict[str, int]:
    """By suite; the empty name: of all others."""
    found = {}
    for value in values or ():
        name, _, number = value.rpartition("=")
        if not number.isdecimal():
            raise EvaluationError(f"--skip {value!r}: write N or NAME=N")
        found[name] = int(number)
    return found
