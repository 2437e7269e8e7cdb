"""Against published values, and those of statsmodels 0.14 for the same tables."""

import pytest

from steering.evaluate.statistics import agreement, compare, holm, mcnemar, median, rate


def table(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], ...]:
    cells = [
        *[(True, True)] * both,
        *[(True, False)] * only_first,
        *[(False, True)] * only_second,
        *[(False, False)] * neither,
    ]
    return [first for first, _ in cells], [second for _, second in cells]


@pytest.mark.parametrize(
    ("hits", "num", "low", "high"),
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_those_of_newcombe(
    hits: int, num: int, low: float, high: float
) -> None:
    found = rate(hits, num)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.share == hits / num


@pytest.mark.parametrize(("hits", "num"), [(0, 0), (3, 2), (-1, 2)])
def test_a_rate_of_nothing_is_refused(hits: int, num: int) -> None:
    with pytest.raises(ValueError, match="no rate"):
        rate(hits, num)


def test_exact_mcnemar() -> None:
    assert mcnemar(3, 10) == pytest.approx(0.09228515625)  # statsmodels
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)  # by hand
    assert mcnemar(0, 0) == 1.0


def test_compare_counts_pairs_that_differ_and_not_rates() -> None:
    """2 of 5 differ one way, none the other; the two rates alone would not say which."""
    found = compare([True, True, True, False, False], [True, False, False, False, False])
    assert (found.num, found.only_first, found.only_second) == (5, 2, 0)
    assert found.difference == pytest.approx(0.4)
    assert found.p == pytest.approx(0.5)


def test_the_bootstrap_interval_is_near_the_normal_one_and_the_same_each_time() -> None:
    first, second = table(both=100, only_first=60, only_second=20, neither=220)
    found = compare(first, second)
    # Variance of a paired difference: ((b + c) - (b - c)^2 / n) / n^2, n = 400.
    spread = 1.96 * ((80 - 40**2 / 400) / 400**2) ** 0.5
    assert (found.low, found.high) == pytest.approx((0.1 - spread, 0.1 + spread), abs=0.004)
    assert compare(first, second) == found
    few = [compare(first, second, seed=seed, num_resamples=10) for seed in (0, 1)]
    assert few[0].low != few[1].low


def test_compare_refuses_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match="2 and 1 outcomes are no pairs"):
        compare([True, False], [True])
    with pytest.raises(ValueError, match="0 and 0"):
        compare([], [])


@pytest.mark.parametrize(
    ("cells", "kappa", "low", "high"),
    [
        ((20, 5, 10, 15), 0.4, 0.151092, 0.648908),
        ((88, 14, 10, 18), 0.480692, 0.302754, 0.658630),
    ],
)
def test_kappa_and_its_interval_are_those_of_statsmodels(
    cells: tuple[int, int, int, int], kappa: float, low: float, high: float
) -> None:
    found = agreement(*table(*cells))
    assert (found.kappa, found.low, found.high) == pytest.approx((kappa, low, high), abs=1e-6)
    assert found.accuracy == pytest.approx((cells[0] + cells[3]) / sum(cells))


def test_kappa_at_its_ends() -> None:
    assert agreement([True, False], [True, False]).kappa == pytest.approx(1.0)
    assert agreement([True, False], [False, True]).kappa == pytest.approx(-1.0)
    same = agreement([True, True], [True, True])
    assert (same.accuracy, same.kappa, same.low) == (1.0, None, None)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # statsmodels
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_interval_of_a_median_is_that_of_its_bootstrap() -> None:
    """Of 11 different values, the exact probability that a resample's median is at most the k-th
    is that of six or more of 11 draws, each with the chance k / 11."""
    from scipy.stats import binom

    values = [3.0, 1.0, 2.0, 11.0, 5.0, 4.0, 7.0, 6.0, 10.0, 8.0, 9.0]
    below = {k: float(binom.sf(5, 11, k / 11)) for k in range(12)}
    low = next(k for k in below if below[k] >= 0.025)
    high = next(k for k in below if below[k] >= 0.975)
    assert min(abs(share - end) for share in below.values() for end in (0.025, 0.975)) > 0.004
    found = median(values, num_resamples=20_000)
    assert (found.value, found.num, found.low, found.high) == (6.0, 11, low, high)
    assert median([2.5]) == type(found)(2.5, 1, 2.5, 2.5)
    with pytest.raises(ValueError, match="no median"):
        median([])
