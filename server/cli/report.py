"""`deshift report`: a judged run's report anew, with what a given model measures of the run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from server.cli.evaluate_options import check_installed
from steering.errors import EvaluationError

if TYPE_CHECKING:  # what they import takes seconds
    from steering.models import LoadedModel
    from steering.vectors import ShiftVectors


def report(
    run_dir: Annotated[
        Path, typer.Argument(help="A run's folder, as `deshift eval` leaves it.", metavar="RUN_DIR")
    ],
    states: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint that was served: run some of the prompts through it, and keep the "
            "hidden states in RUN_DIR/states.npz.",
            metavar="MODEL_DIR",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    perplexity: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint that was served: score every answer with it, unsteered, and keep "
            "the likelihoods in RUN_DIR/perplexity.jsonl. May be given together with --states.",
            metavar="MODEL_DIR",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    vectors: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --states: a vector set that the run used; the demonstration model's is "
            "known. Repeatable.",
            metavar="FILE",
        ),
    ] = None,
    num: Annotated[int, typer.Option(min=2, help="With --states: how many prompts.")] = 48,
    dtype: Annotated[
        str,
        typer.Option(help="With --states or --perplexity: auto, float32, bfloat16 or float16."),
    ] = "auto",
    base: Annotated[
        str, typer.Option(help="The condition that the others are compared with.")
    ] = "base",
) -> None:
    """Write RUN_DIR/report.json and RUN_DIR/report.html: one page that loads nothing.

    `deshift eval` writes both at its end, without hidden states and perplexity; those that were
    measured before stay in the report.
    """
    check_installed()
    from steering.evaluate import report as reports

    if not (run_dir / "run.json").exists():
        raise EvaluationError(f"{run_dir} holds no run")
    if vectors and states is None:
        raise EvaluationError("--vectors is for --states")
    if (model := _one_of(states, perplexity)) is not None:
        loaded = _loaded(run_dir, model, dtype)
        if perplexity is not None:
            _measure_perplexity(run_dir, loaded)
        if states is not None:
            _measure_states(run_dir, loaded, vectors or [], num)
    typer.echo(reports.write(run_dir, base))


def _one_of(states: Path | None, perplexity: Path | None) -> Path | None:
    if states is not None and perplexity is not None and not states.samefile(perplexity):
        raise EvaluationError("--states and --perplexity take the same checkpoint: the run's")
    return states or perplexity


def _loaded(run_dir: Path, model: Path, dtype: str) -> "LoadedModel":
    """Raises EvaluationError for another checkpoint than the run's, ModelError."""
    from server.bench.machine import checkpoint_digest
    from steering.evaluate.record import RunDir
    from steering.models import load_model

    served = RunDir(run_dir).settings().get("checkpoint")
    if served is not None and served != (here := checkpoint_digest(model)):
        raise EvaluationError(
            f"{model} is another checkpoint ({here[:12]}) than the run's ({served[:12]})"
        )
    return load_model(str(model), dtype=dtype)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """How many prompts are done, of how many."""
    with tqdm(unit="prompt", desc=what) as bar:

        def progress(done: int, all_: int) -> None:
            bar.total = all_
            bar.update(done - bar.n)

        yield progress


def _measure_perplexity(run_dir: Path, loaded: "LoadedModel") -> None:
    from steering.evaluate.perplexity import save
    from steering.evaluate.perplexity_passes import measure_perplexity

    with _bar("perplexity") as progress:
        scored = measure_perplexity(run_dir, loaded, progress=progress)
    save(run_dir, scored)


def _measure_states(run_dir: Path, loaded: "LoadedModel", files: list[Path], num: int) -> None:
    """Raises EvaluationError, VectorError."""
    from steering.evaluate.state_passes import measure_states

    given = _vectors(run_dir, files)
    with _bar("states") as progress:
        measured = measure_states(run_dir, loaded, given, num=num, progress=progress)
    measured.save(run_dir)
    for name, why in measured.about["skipped"].items():
        typer.echo(f"{name}: no states: {why}", err=True)


def _vectors(run_dir: Path, files: list[Path]) -> "list[ShiftVectors]":
    """The files, and the demonstration model's own where the run used it."""
    from importlib import resources

    from steering.evaluate.record import RunDir
    from steering.vectors import ShiftVectors

    given = [ShiftVectors.load(path) for path in files]
    own = ShiftVectors.from_bytes(
        (resources.files("steering.demo") / "vectors.safetensors").read_bytes()
    )
    used = {(answer.steering or {}).get("vector") for answer in RunDir(run_dir).answers()}
    return [*given, own] if own.id in used - {each.id for each in given} else given
