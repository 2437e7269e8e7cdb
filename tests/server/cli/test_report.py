"""`deshift report` from its command line."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")

from server.bench.machine import checkpoint_digest
from tests.server.cli.conftest import Deshift
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


def test_another_checkpoint_than_the_runs_measures_no_states(
    deshift: Deshift, tmp_path: Path, tiny_llava: TinyModel
) -> None:
    run, model = make_run(tmp_path / "run", ("base",), ("bad",)), tmp_path / "model"
    tiny_llava.model.save_pretrained(model)
    result = deshift("report", run, "--states", model)
    assert result.exit_code == 1
    assert f"another checkpoint ({checkpoint_digest(model)[:12]})" in words(result.output)
    assert not (run / "states.npz").exists()
