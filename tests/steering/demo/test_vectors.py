"""The vectors that ship with the demonstration model."""

from pathlib import Path

import steering.demo.vectors as shipped
from steering.anchors import load_anchors
from steering.vectors import ShiftVectors

FILE = Path(shipped.__file__).parent / "vectors.safetensors"


def test_the_shipped_set_is_of_the_shipped_anchors_and_holds_all_that_a_method_may_need() -> None:
    vectors = ShiftVectors.load(FILE)
    assert vectors.manifest.anchor_set_digest == load_anchors().digest
    assert vectors.manifest.model.model_id == "demo-model"
    assert vectors.refusal_direction is not None and vectors.reference is not None
    assert vectors.basis is not None and vectors.basis.shape == (30, shipped.BASIS_RANK, 576)
    assert FILE.stat().st_size < 5_000_000
