"""How names are read out of expressions: what other tests find depends on it."""

import pytest

from tests.deploy.expressions import label_names, metric_names, substituted, variables_in


@pytest.mark.parametrize(
    ("text", "metrics", "labels"),
    [
        ("up", {"up"}, set()),
        ("1 - a_ready", {"a_ready"}, set()),
        ("a_total > 1e-5 or vector(0)", {"a_total"}, set()),
        ('rate(a_total{x="b_total"}[5m]) offset 1h', {"a_total"}, {"x"}),
        ("sum by (x, y) (a) / on (z) group_left (w) b", {"a", "b"}, {"x", "y", "z", "w"}),
        ("sum(a) by (x) unless ignoring(y) b", {"a", "b"}, {"x", "y"}),
        ('{__name__=~"a|b", x!="1"}', {"a", "b"}, {"x"}),
        ("r:a_b:mean5m > $quantile * c", {"r:a_b:mean5m", "c"}, set()),
        ('histogram_quantile(0.5, sum by (le) (rate(a_bucket{x=~"$y"}[$__rate_interval])))',
         {"a_bucket"}, {"le", "x"}),
        ('a{x="y{z"}', {"a"}, {"x"}),
    ],
)  # fmt: skip
def test_names_are_found(text: str, metrics: set[str], labels: set[str]) -> None:
    assert (metric_names(text), label_names(text)) == (metrics, labels)


def test_variables_are_found_and_replaced_in_both_spellings() -> None:
    text = 'a{b="$c"}[${d:text}]'
    assert variables_in(text) == {"c", "d"}
    assert substituted(text, {"c": "1", "d": "2m"}) == 'a{b="1"}[2m]'
    with pytest.raises(KeyError, match="d"):
        substituted(text, {"c": "1"})
