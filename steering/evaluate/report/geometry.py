"""Measured hidden states -> what is drawn of them: principal components and numbers by layer.

Pure NumPy. The axes are fitted on the unsteered states with and without the picture, as in the
paper's figure, so that steered states are seen in a plane that they had no part in choosing.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.evaluate.states import IMAGE, PLAIN, TEXT, States

Floats = NDArray[np.float64]


def principal(states: Floats, fitted: Floats) -> tuple[Floats, Floats]:
    """Coordinates (..., 2) of states (..., D) on the first two axes of `fitted` (M, D), and the
    shares of its variance that these explain, (2,). An axis' sign is free: its largest weight is
    made positive."""
    centre = fitted.mean(axis=0)
    _, singular, axes = np.linalg.svd(fitted - centre, full_matrices=False)
    axes, variances = axes[:2], singular**2
    peaks = np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1)
    axes = axes * np.where(peaks < 0, -1.0, 1.0)
    coordinates = (states - centre) @ axes.T
    if coordinates.shape[-1] < 2:
        coordinates = np.concatenate([coordinates, np.zeros_like(coordinates)], axis=-1)
    shares = np.zeros(2)
    shares[: len(variances[:2])] = variances[:2] / max(float(variances.sum()), 1e-30)
    return coordinates, shares


def described(states: States) -> dict[str, Any]:
    """For report.json: the planes of the kept layers, and every layer's numbers."""
    planes = []
    fit = [states.groups.index(TEXT), states.groups.index(IMAGE)]
    for place, layer in enumerate(states.layers.tolist()):
        here = states.states[:, :, place].astype(np.float64)  # (G, N, D)
        coordinates, shares = principal(here, here[fit].reshape(-1, here.shape[-1]))
        planes.append(
            {
                "layer": layer,
                "variance_explained": _plain(shares, 4),
                "points": {
                    group: _plain(coordinates[index], 4)
                    for index, group in enumerate(states.groups)
                },
            }
        )
    steered = states.groups[len(PLAIN) :]
    distances = states.distances / states.distances[0].clip(min=1e-12)
    return {
        "about": dict(states.about),
        "num": states.states.shape[1],
        "planes": planes,
        "layers": {
            "norm": {name: _plain(states.norms[i], 4) for i, name in enumerate(PLAIN)},
            "shift_norm": _plain(states.shift, 4),
            "relative_shift": _plain(states.shift / states.norms[PLAIN.index(TEXT)], 4),
            "consistency": _plain(states.consistency, 4),
            "dose": {name: _plain(states.doses[i], 4) for i, name in enumerate(steered)},
            "distance": {name: _plain(distances[i + 1], 4) for i, name in enumerate(steered)},
        },
    }


def _plain(values: NDArray[Any], digits: int) -> Any:
    """Lists of numbers, of so many significant digits."""
    if values.ndim > 1:
        return [_plain(value, digits) for value in values]
    return [float(f"{value:.{digits}g}") for value in values.tolist()]
