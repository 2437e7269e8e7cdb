"""Rates and medians with intervals, paired comparisons and agreement; arithmetic only.

Two conditions are compared on the same items, so every comparison is paired. Not covered: comparing
what is not yes or no.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm

CONFIDENCE = 0.95
SEED = 0
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Rate:
    """hits of num, and the Wilson score interval of the share."""

    hits: int
    num: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.hits / self.num


@dataclass(frozen=True)
class Median:
    """Of num values, and its percentile interval of a bootstrap over them."""

    value: float
    num: int
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Two outcomes of the same items. only_first, only_second: items where they differ.
    difference: share of the first minus share of the second, with its bootstrap interval.
    p: exact McNemar, two-sided."""

    num: int
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Agreement:
    """Of two judges of the same items. kappa: Cohen's, with its large-sample interval; None where
    chance alone would agree everywhere (both judges always say the same one thing)."""

    num: int
    accuracy: float
    kappa: float | None
    low: float | None
    high: float | None


def rate(hits: int, num: int, confidence: float = CONFIDENCE) -> Rate:
    """Raises ValueError for no items, or hits that are not among them."""
    if not 0 <= hits <= num or num == 0:
        raise ValueError(f"no rate of {hits} in {num}")
    interval = binomtest(hits, num).proportion_ci(confidence, method="wilson")
    return Rate(hits, num, float(interval.low), float(interval.high))


def median(
    values: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
    num_resamples: int = 2_000,
) -> Median:
    """Raises ValueError for no values."""
    if not values:
        raise ValueError("no median of nothing")
    found, random = np.sort(values), np.random.default_rng(seed)
    medians = [  # one resample at a time: all at once are gigabytes
        np.median(found[random.integers(len(found), size=len(found))]) for _ in range(num_resamples)
    ]
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Median(float(np.median(found)), len(found), float(low), float(high))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p that the discordant pairs fall either way with the same chance."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def compare(
    first: Sequence[bool],
    second: Sequence[bool],
    *,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
    num_resamples: int = NUM_RESAMPLES,
) -> Paired:
    """Compare the outcomes of the same items, in one order.

    The interval is the percentile interval of a bootstrap over items; drawing items with
    replacement is drawing how many are discordant either way. Raises ValueError for no items or
    two numbers of them.
    """
    num = _num(first, second)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    shares = np.array([only_first, only_second, num - only_first - only_second]) / num
    drawn = np.random.default_rng(seed).multinomial(num, shares, size=num_resamples)
    differences = (drawn[:, 0] - drawn[:, 1]) / num  # (num_resamples,)
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Paired(
        num=num,
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / num,
        low=float(low),
        high=float(high),
        p=mcnemar(only_first, only_second),
    )


def agreement(
    first: Sequence[bool], second: Sequence[bool], confidence: float = CONFIDENCE
) -> Agreement:
    """Accuracy and Cohen's kappa. Source of the variance: Fleiss, Cohen and Everitt (1969),
    "Large sample standard errors of kappa and weighted kappa". Raises ValueError as `compare`."""
    num = _num(first, second)
    shares = np.zeros((2, 2))  # first x second
    for a, b in zip(first, second, strict=True):
        shares[int(a), int(b)] += 1 / num
    rows, columns = shares.sum(axis=1), shares.sum(axis=0)
    observed, chance = float(np.trace(shares)), float(rows @ columns)
    if math.isclose(chance, 1.0):
        return Agreement(num, observed, None, None, None)
    kappa = (observed - chance) / (1 - chance)
    margins = columns[:, None] + rows[None, :]  # [i, j]: column i + row j
    same = sum(shares[i, i] * (1 - margins[i, i] * (1 - kappa)) ** 2 for i in range(2))
    other = sum(shares[i, 1 - i] * margins[i, 1 - i] ** 2 for i in range(2)) * (1 - kappa) ** 2
    variance = (same + other - (kappa - chance * (1 - kappa)) ** 2) / (num * (1 - chance) ** 2)
    spread = float(norm.ppf((1 + confidence) / 2)) * math.sqrt(max(0.0, float(variance)))
    return Agreement(num, observed, kappa, max(-1.0, kappa - spread), min(1.0, kappa + spread))


def holm(ps: Sequence[float]) -> list[float]:
    """The p values, corrected for that many tests by Holm's step-down method; same order."""
    corrected = [0.0] * len(ps)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = highest
    return corrected


def _num(first: Sequence[bool], second: Sequence[bool]) -> int:
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} outcomes are no pairs")
    return len(first)
