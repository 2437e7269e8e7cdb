"""Hidden states of a run's own prompts, measured anew with the bare model: RUN_DIR/states.npz.

Covers what is kept and its file. How it is measured is in state_passes.py, what is drawn of it in
report/geometry.py. Needs NumPy alone, so that a report is written without a model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from steering.errors import EvaluationError

FILE = "states.npz"
MAX_BYTES = 5_000_000
TEXT, IMAGE, CORRUPTED = "text only", "with picture", "corrupted picture"
PLAIN = (TEXT, IMAGE, CORRUPTED)
Floats = NDArray[np.float32]
_ARRAYS = ("layers", "states", "norms", "shift", "consistency", "doses", "distances")


@dataclass(frozen=True, eq=False)
class States:
    """h_l of the last prompt token, of N prompts in G groups: PLAIN, then the steered conditions.

    about: groups, kinds of the prompts, model, vectors, skipped conditions with reasons. layers
    (n,): those whose states are kept, states (G, N, n, D). For every layer: norms (3, L), the
    median |h_l| of the plain groups; shift (L,), the median |h_l(corrupted) - h_l(text)|;
    consistency (L,), these shifts' mean pairwise cosine; doses (C, L), the median relative dose of
    each steered condition; distances (C + 1, L), the median |h_l - h_l(text)| with the picture,
    unsteered and then in each steered condition.
    """

    about: Mapping[str, Any]
    layers: NDArray[np.int64]
    states: Floats
    norms: Floats
    shift: Floats
    consistency: Floats
    doses: Floats
    distances: Floats

    @property
    def groups(self) -> list[str]:
        return list(self.about["groups"])

    def save(self, run_dir: Path) -> None:
        """States as float16 with a scale a layer: some models' are beyond float16's range."""
        scale = np.abs(self.states).max(axis=(0, 1, 3)).clip(min=1e-12)  # (n,)
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays["states"] = (self.states / scale[:, None]).astype(np.float16)
        arrays |= {"scale": scale, "about": np.array(json.dumps(dict(self.about)))}
        part = run_dir / (FILE + ".part")
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)
        part.replace(run_dir / FILE)

    @classmethod
    def load(cls, run_dir: Path) -> "States | None":
        """None where none were measured. Raises EvaluationError for a file that is none."""
        path = run_dir / FILE
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in _ARRAYS}
                arrays["states"] = arrays["states"].astype(np.float32) * file["scale"][:, None]
                return cls(about=json.loads(str(file["about"])), **arrays)
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise EvaluationError(f"{path}: no states ({type(error).__name__})") from None


def kept_layers(num_layers: int, num: int = 4) -> list[int]:
    """Some layers spread over the depth, the last among them."""
    return sorted({round((place + 1) * num_layers / num) - 1 for place in range(num)} - {-1})


def affordable(num_groups: int, num_layers: int, hidden_size: int, num: int) -> int:
    """How many prompts of `num` fit into MAX_BYTES, two bytes a coordinate; at least 2."""
    return max(2, min(num, (MAX_BYTES - 500_000) // (2 * num_groups * num_layers * hidden_size)))
