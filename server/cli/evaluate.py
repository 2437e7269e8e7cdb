"""`deshift eval`: suites of prompts against a server in several conditions, judged and reported."""

import asyncio
import contextlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from server.errors import ServerError
from steering.errors import EvaluationError

if TYPE_CHECKING:  # what they import takes seconds
    from steering.evaluate.evaluation import Evaluation
    from steering.evaluate.record import Answer, RunDir
    from steering.evaluate.run import Tally

_SERVED = "eval-server"
_EXTRA = ("matplotlib", "scipy", "tenacity")


@dataclass(frozen=True)
class _Place:
    """Which server: a URL, or one that is started here with settings of its own."""

    url: str | None
    demo: bool
    serve: Path | None
    settings: tuple[tuple[str, str], ...]
    dtype: str
    logs: Path

    def check(self) -> None:
        if sum((self.url is not None, self.demo, self.serve is not None)) != 1:
            raise EvaluationError("which server? Give one of --url, --demo and --serve")
        if self.url is not None and self.settings:
            raise EvaluationError("--setting is for a server that is started here, not for --url")


def evaluate(
    out: Annotated[Path, typer.Option(help="The run's folder; made here.", metavar="RUN_DIR")],
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="rendered (our own pictures), NAME=PATH of vlsafe, advbench, jailbreakllms, "
            "xstest, xstest-unsafe, alpaca, figstep, mm-safetybench or llava-bench-coco, "
            "NAME=hf:ORG/DATASET or NAME=hf:ORG/DATASET/SPLIT of these, or NAME=FILE.jsonl with "
            "rows of id, prompt, kind and, if need be, image, caption, answers. Repeatable.",
            metavar="SUITE",
        ),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            help="base, text-only, caption, blank, noise, served (as the policy has it), or "
            "dataset or sample with fields: dataset:alpha=0.2,schedule=incremental; also method, "
            "gate and corruption. Repeatable.",
            metavar="CONDITION",
        ),
    ] = None,
    conditions_set: Annotated[
        str | None,
        typer.Option(
            help="`table`: those of the README's table, with the demonstration model's strengths."
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A running server, of ours or any OpenAI-compatible one.")
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Start a server on the demonstration model.")
    ] = False,
    serve: Annotated[
        Path | None,
        typer.Option(help="Start a server on a checkpoint.", exists=True, file_okay=False),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="A setting of the started server.", metavar="NAME=VALUE"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Number format of a started server.")] = "bfloat16",
    model: Annotated[
        str | None, typer.Option(help="The model to ask for; by default the first listed.")
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="The environment variable that holds the API key.", metavar="NAME"),
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Option(
            help="Folder of photographs for prompts without a picture; by default rendered ones.",
            metavar="DIR",
        ),
    ] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Prompts of each suite.")] = 200,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out a suite's first rows, which somebody has looked at: N or NAME=N.",
            metavar="N|NAME=N",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sample, pictures and server.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 16,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in RUN_DIR.")
    ] = False,
    logs: Annotated[Path, typer.Option(help="Directory for a started server's log.")] = Path(
        ".deshift/eval"
    ),
) -> None:
    """Ask a server every prompt of every suite in every condition, judge the answers, report.

    Each answer is kept as it comes; a run that was interrupted goes on with --resume and the same
    options, and asks again what had ended in an error. What the server did is read from each
    answer: one that was not steered as its condition says counts as an error, not as an answer.
    RUN_DIR holds run.json (all settings), items.jsonl (the prompts), answers.jsonl, judged.jsonl,
    report.json and report.html.

    The same seed gives the same prompts, and a larger --num the same ones first. Answers are
    greedy.
    """
    _check_installed()
    place = _Place(url, demo, serve, tuple(_pairs(setting, "--setting")), dtype, logs)
    place.check()
    api_key = _api_key(api_key_env)
    evaluation = _evaluation(
        suite or [], condition or [], conditions_set, photos, num, _skips(skip), seed, max_tokens
    )
    from steering.evaluate.record import RunDir

    folder = RunDir(out)
    with contextlib.ExitStack() as stack:
        address, checkpoint = _started(stack, place, evaluation, concurrency)
        evaluation = replace(evaluation, checkpoint=checkpoint)
        start = {"suites": suite, "photos": evaluation.photos.source, "concurrency": concurrency}
        try:
            tally = asyncio.run(
                _ask(address, api_key, model, evaluation, folder, start, resume, concurrency)
            )
        except KeyboardInterrupt:
            typer.echo(f"stopped; what was answered is in {out}: go on with --resume", err=True)
            raise typer.Exit(130) from None
    _say_errors(folder, tally)


async def _ask(
    address: str,
    api_key: str | None,
    model: str | None,
    evaluation: "Evaluation",
    folder: "RunDir",
    start: Mapping[str, Any],
    resume: bool,
    concurrency: int,
) -> "Tally":
    from server.bench import machine
    from steering.evaluate.client import connect, http_client
    from steering.evaluate.run import Asker, for_server, run

    async with http_client(address, api_key, concurrency) as client:
        server = await connect(client, model)
        evaluation = replace(evaluation, conditions=for_server(evaluation.conditions, server))
        asker = Asker(client, server, evaluation.sampling)
        circumstances = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "url": server.url,
            "listed": server.listed,
            "ready": server.ready,
            "machine": machine.describe(),
            **start,
        }
        with tqdm(unit="answer", dynamic_ncols=True) as bar:
            return await run(
                evaluation,
                asker,
                folder,
                start=circumstances,
                resume=resume,
                concurrency=concurrency,
                begun=lambda known, all_: _begin(bar, known, all_),
                done=_progress(bar),
            )


def _begin(bar: Any, known: int, all_: int) -> None:
    bar.reset(total=all_)
    bar.update(known)


def _progress(bar: Any) -> "Callable[[Answer], None]":
    errors = 0

    def done(answer: "Answer") -> None:
        nonlocal errors
        if answer.error is not None:
            errors += 1
            bar.set_postfix(errors=errors)
        bar.update()

    return done


def _evaluation(
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


def _started(
    stack: contextlib.ExitStack, place: _Place, evaluation: "Evaluation", concurrency: int
) -> tuple[str, str | None]:
    """The URL, and what a server that is started here serves. Raises ServerError."""
    if place.url is not None:
        return place.url, None
    from server.bench import machine, servers
    from server.bench.target import BenchError
    from server.config import PREFIX
    from server.process import ChildError

    try:
        checkpoint = servers.checkpoint(place.serve, place.demo, None)
        assert checkpoint is not None
        env = {f"{PREFIX}MAX_ROWS": str(concurrency)}
        if all(condition.name != "served" for condition in evaluation.conditions):
            # Every request says how it is to be steered, so that none needs a policy's vectors.
            env[f"{PREFIX}STEERING_MODE"] = "off"
        env |= checkpoint.env
        env |= {f"{PREFIX}{name.upper()}": value for name, value in place.settings}
        typer.echo(f"Starting the server (its log: {place.logs / _SERVED}.log)", err=True)
        served = servers.deshift_serve(_SERVED, checkpoint.model, place.logs, place.dtype, env)
        target = stack.enter_context(served)
    except (BenchError, ChildError) as error:
        raise ServerError(str(error)) from None
    return target.url, machine.checkpoint_digest(checkpoint.model)


def _say_errors(folder: "RunDir", tally: "Tally") -> None:
    """How many answers there are; each kind of error once, with its number."""
    errors = Counter(answer.error for answer in folder.answers() if answer.error is not None)
    total = sum(errors.values())
    typer.echo(f"{tally.num_asked} requests, {total} of them ended in an error", err=True)
    for error, number in errors.most_common(5):
        typer.echo(f"  {number} x {error}", err=True)


def _check_installed() -> None:
    """Raises EvaluationError, naming the extra that has what is missing."""
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise EvaluationError(f"{', '.join(missing)} missing: pip install 'deshift[eval]'")


def _skips(values: Sequence[str] | None) -> dict[str, int]:
    """By suite; the empty name: of all others."""
    found = {}
    for value in values or ():
        name, _, number = value.rpartition("=")
        if not number.isdecimal():
            raise EvaluationError(f"--skip {value!r}: write N or NAME=N")
        found[name] = int(number)
    return found


def _pairs(values: Sequence[str] | None, option: str) -> list[tuple[str, str]]:
    pairs = [value.partition("=") for value in values or ()]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise EvaluationError(f"{option} {name!r}: write NAME=VALUE")
    return [(name, value) for name, _, value in pairs]


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise EvaluationError(f"--api-key-env {variable}: no such environment variable, or empty")
    return key
