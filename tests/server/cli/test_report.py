"""`deshift report` from its command line."""

import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")

from server.bench.machine import checkpoint_digest
from steering.evaluate.items import Item
from steering.evaluate.judge import judge_run
from steering.evaluate.perplexity import FILE, load
from steering.evaluate.record import RunDir
from tests.server.cli.conftest import Deshift
from tests.steering.evaluate.judged_runs import HELP, add, answer
from tests.steering.evaluate.report_runs import make_run
from tests.tiny_models import TinyModel


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_report_is_written_anew_against_another_base(deshift: Deshift, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("base", "text-only"), ("bad",))
    result = deshift("report", run)
    assert result.exit_code == 0, result.output
    assert str(run / "report.html") in words(result.stdout).replace(" ", "")
    assert json.loads((run / "report.json").read_text())["base"] == "base"
    assert deshift("report", run, "--base", "text-only").exit_code == 0
    assert json.loads((run / "report.json").read_text())["base"] == "text-only"


def test_what_is_no_run_and_vectors_without_a_model_are_refused(
    deshift: Deshift, tmp_path: Path
) -> None:
    result = deshift("report", tmp_path)
    assert result.exit_code == 1 and "holds no run" in words(result.output)
    run = make_run(tmp_path / "run", ("base",), ("bad",))
    result = deshift("report", run, "--vectors", tmp_path / "vectors.safetensors")
    assert result.exit_code == 1 and "--vectors is for --states" in words(result.output)


@pytest.mark.parametrize("option", ["--states", "--perplexity"])
def test_another_checkpoint_than_the_runs_measures_nothing(
    deshift: Deshift, tmp_path: Path, tiny_llava: TinyModel, option: str
) -> None:
    run, model = make_run(tmp_path / "run", ("base",), ("bad",)), tmp_path / "model"
    tiny_llava.model.save_pretrained(model)
    result = deshift("report", run, option, model)
    assert result.exit_code == 1
    assert f"another checkpoint ({checkpoint_digest(model)[:12]})" in words(result.output)
    assert not (run / "states.npz").exists() and not (run / FILE).exists()


def test_states_and_perplexity_are_measured_together(
    deshift: Deshift, tmp_path: Path, checkpoint: Path
) -> None:
    items = []
    for number, kind in enumerate(("harmful", "harmless")):
        Image.new("RGB", (30, 30), (100 * number, 0, 0)).save(tmp_path / f"{number}.png")
        picture = tmp_path / f"{number}.png"
        items.append(Item(str(number), "own", kind, f"Say {number}", picture))  # type: ignore[arg-type]
    run = RunDir(tmp_path / "run")
    base = {"name": "base", "picture": "own", "steering": {"mode": "off"}}
    settings = {"conditions": [base], "checkpoint": checkpoint_digest(checkpoint)}
    run.begin(settings, {}, items, resume=False)
    add(run.path, [answer(item, "base", HELP) for item in items])
    judge_run(run.path)
    result = deshift("report", run.path, "--states", checkpoint, "--perplexity", tmp_path)
    assert result.exit_code == 1 and "take the same checkpoint" in words(result.output)
    result = deshift("report", run.path, "--states", checkpoint, "--perplexity", checkpoint)
    assert result.exit_code == 0, result.output
    document = json.loads((run.path / "report.json").read_text())
    assert document["states"]["num"] == 2
    [condition] = document["perplexity"]["conditions"]
    assert condition["num"] == 2
    scored = load(run.path)
    assert scored is not None and [each.num_tokens for each in scored] == [len(HELP)] * 2
