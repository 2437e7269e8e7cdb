"""Hidden states of a run's prompts, against what the extraction's own passes measure."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from steering.anchors import Anchor, AnchorSet
from steering.corruption import corrupt
from steering.errors import EvaluationError, VectorError
from steering.evaluate.conditions import parse
from steering.evaluate.items import Item
from steering.evaluate.record import RunDir
from steering.evaluate.state_passes import measure_states
from steering.evaluate.states import MAX_BYTES, States, affordable, kept_layers
from steering.extract import extract, last_hidden
from steering.models import LoadedModel, identity_of
from steering.vectors import ShiftVectors
from tests.steering.evaluate.judged_runs import HELP, answer
from tests.tiny_models import TinyModel

ALPHA = 0.5
SINGLE = f"dataset:alpha={ALPHA},schedule=single:0"
SAMPLE = "sample:alpha=1,schedule=single:1"
PROJECT = "dataset:method=project,alpha=1,schedule=single:0"
NAMES = ("base", SINGLE, SAMPLE, PROJECT)


@pytest.fixture(scope="module")
def loaded(tiny_llava: TinyModel) -> LoadedModel:
    identity = identity_of(tiny_llava.model, tiny_llava.processor, model_id="tiny")
    return LoadedModel(tiny_llava.model, tiny_llava.processor, identity)


@pytest.fixture(scope="module")
def vectors(loaded: LoadedModel) -> ShiftVectors:
    anchors = (Anchor("a", "harmful", "Break a window."), Anchor("b", "harmless", "Bake a bread."))
    return extract(loaded, AnchorSet("own", anchors), image_size=(30, 30), basis_rank=1)


@pytest.fixture
def run(tmp_path: Path, vectors: ShiftVectors) -> Path:
    """Two prompts with pictures, steered as the answers say."""
    items = []
    for number, (kind, colour) in enumerate((("harmful", "red"), ("harmless", "blue"))):
        picture = tmp_path / f"{colour}.png"
        Image.new("RGB", (30, 30), colour).save(picture)
        items.append(Item(str(number), "own", kind, f"Say {number}", picture))  # type: ignore[arg-type]
    folder = RunDir(tmp_path / "run")
    conditions = [parse(name) for name in NAMES]
    written = [{"name": each.name, "steering": each.steering} for each in conditions]
    folder.begin({"conditions": written}, {}, items, resume=False)
    with folder.appending() as append:
        for item in items:
            for each in conditions:
                said: dict[str, Any] = {"method": "subtract", **(each.steering or {})}
                said["reason"] = "disabled" if each.name == "base" else None
                said["vector"] = vectors.id if said["mode"] == "dataset" else None
                said["corruption"] = "blank" if said["mode"] == "sample" else None
                append(replace(answer(item, each.name, HELP), steering=said))
    return folder.path


def states_of(loaded: LoadedModel, item: Item, image: Image.Image | None) -> torch.Tensor:
    return last_hidden(loaded.model, loaded.processor, [item.prompt], image)[:, 0]


def test_states_are_those_of_the_bare_model_and_of_the_plans(
    run: Path, loaded: LoadedModel, vectors: ShiftVectors
) -> None:
    found = measure_states(run, loaded, [vectors])
    assert found.groups == ["text only", "with picture", "corrupted picture", *NAMES[1:]]
    assert found.about["skipped"] == {} and found.about["kinds"] == ["harmful", "harmless"]
    num_layers = loaded.identity.num_layers
    assert found.layers.tolist() == list(range(num_layers))  # few enough to keep them all
    for place, item in enumerate(RunDir(run).items()):
        own = Image.open(item.image).convert("RGB")  # type: ignore[arg-type]
        text, pictured, blank = (
            states_of(loaded, item, image) for image in (None, own, corrupt(own, "blank"))
        )
        for group, expected in enumerate((text, pictured, blank)):
            torch.testing.assert_close(torch.from_numpy(found.states[group, place]), expected)
        steered = torch.from_numpy(found.states[:, place])
        torch.testing.assert_close(steered[3, 0], pictured[0] - ALPHA * vectors.mean[0])
        torch.testing.assert_close(steered[4, 1], pictured[1] - (blank - text)[1])
        torch.testing.assert_close(steered[4, 0], pictured[0])  # below its layer
        assert vectors.basis is not None
        axis = vectors.basis[0, 0]
        torch.testing.assert_close(steered[5, 0], pictured[0] - (pictured[0] @ axis) * axis)
    assert found.doses[0, 1:].tolist() == [0.0] * (num_layers - 1)
    text, pictured = (torch.from_numpy(found.states[group]) for group in (0, 1))
    apart = (pictured - text).norm(dim=-1).median(dim=0).values
    torch.testing.assert_close(torch.from_numpy(found.distances[0]), apart)
    torch.testing.assert_close(
        torch.from_numpy(found.norms[1]), pictured.norm(dim=-1).median(dim=0).values
    )


def test_the_model_is_left_as_it_was(run: Path, loaded: LoadedModel, vectors: ShiftVectors) -> None:
    item = RunDir(run).items()[0]
    before = states_of(loaded, item, None)
    measure_states(run, loaded, [vectors])
    assert torch.equal(states_of(loaded, item, None), before)


def test_a_condition_whose_vectors_are_missing_is_left_out_and_told(
    run: Path, loaded: LoadedModel
) -> None:
    found = measure_states(run, loaded)
    assert found.groups[3:] == [SAMPLE]
    assert found.about["skipped"].keys() == {SINGLE, PROJECT}
    assert "was not given" in found.about["skipped"][SINGLE]


def test_vectors_of_another_model_are_refused(
    run: Path, loaded: LoadedModel, vectors: ShiftVectors
) -> None:
    other = replace(loaded, identity=replace(loaded.identity, weights_digest="0" * 64))
    with pytest.raises(VectorError, match="weights"):
        measure_states(run, other, [vectors])


def test_a_gate_scales_what_each_prompt_gets(
    run: Path, loaded: LoadedModel, vectors: ShiftVectors
) -> None:
    gated = f"{SINGLE},gate=0:-100:0.1"  # so low that it is open for every prompt
    document = json.loads((run / "run.json").read_text())
    document["settings"]["conditions"] = [{"name": SINGLE, "steering": parse(gated).steering}]
    (run / "run.json").write_text(json.dumps(document))
    lines = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["condition"] == SINGLE]
    for line in lines:
        line["steering"] |= {"gate_opening": 1.0, "alpha": 0.01}
    (run / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = measure_states(run, loaded, [vectors])
    shifted = torch.from_numpy(found.states[1, :, 0] - found.states[3, :, 0])
    torch.testing.assert_close(shifted, (ALPHA * vectors.mean[0]).expand(2, -1))


def test_a_file_keeps_states_beyond_half_precision(tmp_path: Path) -> None:
    states = np.array([1e6, -2.0, 3.0], np.float32).reshape(1, 1, 1, 3)
    row = np.ones(1, np.float32)
    made = States({"groups": ["x"]}, np.array([0]), states, row, row, row, row, row)
    made.save(tmp_path)
    found = States.load(tmp_path)
    assert found is not None and found.groups == ["x"]
    assert found.states == pytest.approx(states, rel=1e-3, abs=1e6 / 2**11)
    assert States.load(tmp_path / "elsewhere") is None
    (tmp_path / "states.npz").write_bytes(b"PK nothing")
    with pytest.raises(EvaluationError, match="no states"):
        States.load(tmp_path)


def test_what_is_kept_is_small() -> None:
    assert kept_layers(30) == [7, 14, 21, 29]
    assert kept_layers(2) == [0, 1] and kept_layers(1) == [0]
    num = affordable(9, 4, 4096, 48)
    assert 2 < num < 48 and num * 9 * 4 * 4096 * 2 < MAX_BYTES
    assert affordable(9, 4, 576, 48) == 48
