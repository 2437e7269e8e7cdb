"""Measure the shift vectors that ship with the demonstration model.

`python -m steering.demo.vectors --cache DIR --out vectors.safetensors`: a few minutes on two cores.
On one kind of processor the tensors come out the same to the bit; the id covers the time of making
too, so it is a new one each time.
"""

import argparse
import os
from pathlib import Path

from steering.anchors import load_anchors
from steering.demo.assemble import assemble, default_cache
from steering.extract import extract
from steering.models import load_model
from steering.vectors import ShiftVectors

BASIS_RANK = 8
# Part of the recipe: in bfloat16 another size rounds otherwise, which moves the mean by 0.2 %.
BATCH_SIZE = 16


def measure(cache: Path) -> ShiftVectors:
    """Of the assembled model in bfloat16, on all anchors that ship."""
    loaded = load_model(str(assemble(cache / "demo-model")), dtype="bfloat16", device="cpu")
    return extract(loaded, load_anchors(), batch_size=BATCH_SIZE, basis_rank=BASIS_RANK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=default_cache(os.environ))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vectors.safetensors")
    arguments = parser.parse_args()
    vectors = measure(arguments.cache)
    vectors.save(arguments.out)
    print(vectors.id)


if __name__ == "__main__":
    main()
