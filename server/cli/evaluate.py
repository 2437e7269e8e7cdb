"""`deshift eval`: suites of prompts against a server in several conditions, judged and reported."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from server.cli import server_options
from server.cli.evaluate_options import (
    Connection,
    Place,
    check_installed,
    evaluation_of,
    resumable,
    skips_of,
    started,
)
from server.cli.judging import (
    JudgeKeyEnvOption,
    JudgeModelOption,
    JudgeUrlOption,
    check_judge,
    judge_and_report,
    key_from,
)
from server.cli.options import pairs
from steering.errors import EvaluationError

if TYPE_CHECKING:  # what they import takes seconds
    from steering.evaluate.evaluation import Evaluation
    from steering.evaluate.record import Answer, RunDir
    from steering.evaluate.run import Tally


def evaluate(
    out: server_options.Out,
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
    demo: server_options.Demo = False,
    serve: server_options.Serve = None,
    setting: server_options.Setting = None,
    dtype: server_options.Dtype = "bfloat16",
    model: server_options.Model = None,
    api_key_env: server_options.ApiKeyEnv = None,
    photos: server_options.Photos = None,
    num: Annotated[int | None, typer.Option(min=1, help="Prompts of each suite.")] = 200,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out a suite's first rows, which somebody has looked at: N or NAME=N.",
            metavar="N|NAME=N",
        ),
    ] = None,
    seed: server_options.Seed = 1,
    max_tokens: server_options.MaxTokens = 32,
    concurrency: server_options.Concurrency = 16,
    resume: server_options.Resume = False,
    judge_url: JudgeUrlOption = None,
    judge_model: JudgeModelOption = None,
    judge_key_env: JudgeKeyEnvOption = None,
    only_judge: Annotated[
        bool,
        typer.Option("--only-judge", help="Ask no server; judge what RUN_DIR holds, and report."),
    ] = False,
    logs: server_options.Logs = Path(".deshift/eval"),
) -> None:
    """Ask a server every prompt of every suite in every condition, judge the answers, report.

    Each answer is kept as it comes; a run that was interrupted goes on with --resume and the same
    options, and asks again what had ended in an error. What the server did is read from each
    answer: one that was not steered as its condition says counts as an error, not as an answer.
    RUN_DIR holds run.json (all settings), items.jsonl (the prompts), answers.jsonl, judged.jsonl,
    judges.json, report.json and report.html (`deshift report` adds hidden states and
    perplexity to these).

    The same seed gives the same prompts, and a larger --num the same ones first. Answers are
    greedy.
    """
    check_installed()
    check_judge(judge_url, judge_model, judge_key_env)
    if only_judge:
        judge_and_report(out, judge_url, judge_model, judge_key_env)
        return
    settings = pairs(setting, "--setting", EvaluationError)
    place = Place(url, demo, serve, tuple(settings), dtype, logs)
    api_key = key_from(api_key_env, "--api-key-env")
    evaluation = evaluation_of(
        suite or [], condition or [], conditions_set, photos, num, skips_of(skip), seed, max_tokens
    )
    from steering.evaluate.record import RunDir

    folder = RunDir(out)
    start = {
        "suites": suite,
        "photos": evaluation.photos.source,
        "concurrency": concurrency,
        "server": place.options(),
    }
    with contextlib.ExitStack() as stack:
        address, evaluation = started(stack, place, evaluation, concurrency)
        connection = Connection(address, api_key, model, concurrency)
        with resumable(out):
            tally = asyncio.run(_ask(connection, evaluation, folder, start, resume))
    _say_errors(folder, tally)
    judge_and_report(out, judge_url, judge_model, judge_key_env)


async def _ask(
    connection: Connection,
    evaluation: "Evaluation",
    folder: "RunDir",
    start: Mapping[str, Any],
    resume: bool,
) -> "Tally":
    from server.bench import machine
    from steering.evaluate.client import connect, http_client
    from steering.evaluate.run import Asker, for_server, run

    concurrency = connection.concurrency
    async with http_client(connection.url, connection.api_key, concurrency) as client:
        server = await connect(client, connection.model)
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


def _say_errors(folder: "RunDir", tally: "Tally") -> None:
    """How many answers there are; each kind of error once, with its number."""
    errors = Counter(answer.error for answer in folder.answers() if answer.error is not None)
    total = sum(errors.values())
    typer.echo(f"{tally.num_asked} requests, {total} of them ended in an error", err=True)
    for error, number in errors.most_common(5):
        typer.echo(f"  {number} x {error}", err=True)
