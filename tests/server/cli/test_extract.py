"""`deshift extract`, from a checkpoint to an alias that a server can follow."""

import asyncio
import json
from pathlib import Path

import pytest

from steering.models import load_model
from steering.stores import opened_store
from steering.stores.base import aliases
from steering.vectors import ShiftVectors
from tests.server.cli.conftest import Deshift


def test_a_model_becomes_a_stored_activated_set_and_a_file(
    deshift: Deshift, checkpoint: Path, anchors: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "set.safetensors"
    result = deshift(
        *("extract", "--model", checkpoint, "--dtype", "float32", "--anchors", anchors),
        *("--batch-size", 3, "--basis-rank", 2, "--image-size", "32x16", "--corruption", "gray"),
        *("--activate", "--alias", "spare", "--output", output),
    )
    assert result.exit_code == 0, result.stderr
    vectors = ShiftVectors.load(output)
    assert f"vector set {vectors.id} is in sqlite:///" in result.stdout
    assert "4/4" in result.stderr  # the progress bar

    async def check() -> None:
        async with opened_store(f"sqlite:///{tmp_path}/cache/deshift.db") as store:
            assert await aliases(store) == {"default": vectors.id, "spare": vectors.id}
            assert (await store.get_vectors(vectors.id)).to_bytes() == output.read_bytes()
            entries = [json.loads(record.entry) for record in await store.audit(9)]
            assert {entry["by"] for entry in entries} == {"deshift extract"}

    asyncio.run(check())
    manifest = vectors.manifest
    assert (manifest.corruption, manifest.image_size) == ("gray", "32x16")
    assert (manifest.anchor_set, manifest.num_anchors) == ("few", 4)
    assert manifest.model == load_model(str(checkpoint), dtype="float32").identity
    assert vectors.basis is not None and vectors.basis.shape[1] == 2


def test_the_model_may_come_from_the_environment_and_the_answer_may_be_json(
    deshift: Deshift, checkpoint: Path, anchors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DESHIFT_MODEL", str(checkpoint))
    result = deshift("extract", "--anchors", anchors, "--json")
    answer = json.loads(result.stdout)
    assert answer["aliases"] == []
    assert answer["manifest"]["model"]["model_id"] == "tiny-llava"
    assert len(answer["id"]) == 64


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        ((), 2, "--model"),
        (("--model", "m", "--image-size", "12"), 2, "WIDTHxHEIGHT"),
        (("--model", "m", "--image-size", "0x12"), 2, "WIDTHxHEIGHT"),
        (("--model", "m", "--corruption", "black"), 2, "black"),
        (("--model", "m", "--batch-size", "0"), 2, "batch-size"),
        (("--model", "./none"), 1, "deshift: ./none: no such directory"),
        (("--model", "m", "--anchors", "none.jsonl"), 1, "deshift: anchor file none.jsonl"),
        (("--model", "m", "--store", "mysql://x"), 1, "sqlite:///path"),
        (("--model", "m", "--store", "redis://u:pw@127.0.0.1:1"), 1, "store redis://127.0.0.1:1"),
        (("--model", "m", "--dtype", "int4"), 1, "DESHIFT_DTYPE"),
    ],
)
def test_an_error_is_one_line_on_stderr_or_a_usage_message(
    deshift: Deshift, arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    result = deshift("extract", *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    if exit_code == 1:
        assert result.stderr.count("\n") == 1


def test_an_unbalanced_file_is_refused_until_asked_for(
    deshift: Deshift, checkpoint: Path, anchors: Path
) -> None:
    anchors.write_text(anchors.read_text().rsplit("\n", 1)[0])
    command = ("extract", "--model", checkpoint, "--anchors", anchors)
    assert "2 harmful and 1 harmless" in deshift(*command).stderr
    assert deshift(*command, "--unbalanced").exit_code == 0
