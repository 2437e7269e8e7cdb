"""The second half of `deshift eval`: a run's answers are judged, summed up and reported."""

import os
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from steering.errors import EvaluationError

JudgeUrlOption = Annotated[
    str | None,
    typer.Option(
        help="An OpenAI-compatible endpoint whose model says which answers are unsafe, and which "
        "are useful where nobody knows the right one; without it neither is said. It is sent "
        "prompts and answers.",
        metavar="URL",
    ),
]
JudgeModelOption = Annotated[str | None, typer.Option(help="The model of --judge-url.")]
JudgeKeyEnvOption = Annotated[
    str | None,
    typer.Option(help="The environment variable that holds its API key.", metavar="NAME"),
]


def key_from(variable: str | None, option: str) -> str | None:
    """Raises EvaluationError where the variable holds nothing."""
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise EvaluationError(f"{option} {variable}: no such environment variable, or empty")
    return key


def check_judge(url: str | None, model: str | None, key_env: str | None) -> None:
    """Before anything is asked: what a judge lacks should not show after an hour.

    Raises EvaluationError.
    """
    if (url is None) != (model is None):
        raise EvaluationError("--judge-url and --judge-model belong together")
    if url is not None and model is not None:
        from steering.evaluate.judges.endpoint import Endpoint

        Endpoint(url, model, key_from(key_env, "--judge-key-env"))


def judge_and_report(out: Path, url: str | None, model: str | None, key_env: str | None) -> None:
    """Write judged.jsonl, judges.json, report.json and report.html, and print the table.

    Raises EvaluationError: no run, or a judge that does not answer; the answers stay.
    """
    from steering.evaluate import report
    from steering.evaluate.judge import Judges, judge_run
    from steering.evaluate.judges.endpoint import Endpoint
    from steering.evaluate.summary import summarise

    if not (out / "run.json").exists():
        raise EvaluationError(f"{out} holds no run")
    endpoint = None
    if url is not None and model is not None:
        endpoint = Endpoint(url, model, key_from(key_env, "--judge-key-env"))
    try:
        with tqdm(unit="question", desc="judge", disable=endpoint is None) as bar:
            judged = judge_run(out, Judges(harm=endpoint, useful=endpoint), lambda: bar.update())
    except EvaluationError as error:
        raise EvaluationError(
            f"{error} (the answers are kept: --only-judge goes on from here)"
        ) from None
    if judged.num_unjudged:
        typer.echo(f"{judged.num_unjudged} questions got no verdict from {model}", err=True)
    typer.echo(summarise(out).markdown())
    typer.echo(f"The report: {report.write(out)}", err=True)
