"""`deshift report`: a judged run's report anew, with hidden states if a model is given."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from server.cli.evaluate_options import check_installed
from steering.errors import EvaluationError

if TYPE_CHECKING:  # what it imports takes seconds
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
        str, typer.Option(help="With --states: auto, float32, bfloat16 or float16.")
    ] = "auto",
    base: Annotated[
        str, typer.Option(help="The condition that the others are compared with.")
    ] = "base",
) -> None:
    """Write RUN_DIR/report.json and RUN_DIR/report.html: one page that loads nothing.

    `deshift eval` writes both at its end, without hidden states; states that were measured before
    stay in the report.
    """
    check_installed()
    from steering.evaluate import report as reports

    if not (run_dir / "run.json").exists():
        raise EvaluationError(f"{run_dir} holds no run")
    if states is not None:
        _measure(run_dir, states, vectors or [], num, dtype)
    elif vectors:
        raise EvaluationError("--vectors is for --states")
    typer.echo(reports.write(run_dir, base))


def _measure(run_dir: Path, model: Path, files: list[Path], num: int, dtype: str) -> None:
    """Raises EvaluationError for another checkpoint than the run's, ModelError, VectorError."""
    from server.bench.machine import checkpoint_digest
    from steering.evaluate.record import RunDir
    from steering.evaluate.state_passes import measure_states
    from steering.models import load_model

    served = RunDir(run_dir).settings().get("checkpoint")
    if served is not None and served != (here := checkpoint_digest(model)):
        raise EvaluationError(
            f"{model} is another checkpoint ({here[:12]}) than the run's ({served[:12]})"
        )
    loaded = load_model(str(model), dtype=dtype)
    given = _vectors(run_dir, files)
    with tqdm(unit="prompt", desc="states") as bar:

        def progress(done: int, all_: int) -> None:
            bar.total = all_
            bar.update(done - bar.n)

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
