"""Series and their text, read by the parsers of prometheus_client."""

import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from server.engine.stats import Distribution
from server.metrics.families import Histograms, Numbers, number_text

CONSTANT = 'model_name="m"'
ODD = 'a "quoted" \\ back\nslash {x="1"} # é'


def text_of(family: Numbers | Histograms, is_openmetrics: bool = True) -> str:
    lines = family.lines(with_exemplars=is_openmetrics)
    return family.head(is_openmetrics) + "".join(lines)


@pytest.mark.parametrize("is_openmetrics", [True, False])
def test_the_text_is_what_prometheus_client_writes_of_the_same_values(is_openmetrics: bool) -> None:
    """But for the time of creation, which is left out."""
    registry = CollectorRegistry()
    theirs = Counter("x_requests_total", 'how "many"', ["model_name", "who"], registry=registry)
    ours = Numbers("counter", "x_requests_total", 'how "many"', ("who",), CONSTANT)
    bounds = (0.001, 0.5, 10.0)
    their_times = Histogram(
        "x_seconds", "long", ["model_name", "who"], registry=registry, buckets=bounds
    )
    our_times = Histograms("x_seconds", "long", ("who",), bounds, CONSTANT)
    for who, value in (("a", 0.001), (ODD, 3.25), ("a", 11.0), ("a", 0.0)):
        theirs.labels("m", who).inc(value)
        ours.inc(who, by=value)
        their_times.labels("m", who).observe(value)
        our_times.observe(value, who)
    generate = openmetrics.generate_latest if is_openmetrics else generate_latest
    expected = [
        line
        for line in generate(registry).decode().splitlines()
        if "_created" not in line and line != "# EOF"
    ]
    found = (text_of(ours, is_openmetrics) + text_of(our_times, is_openmetrics)).splitlines()
    # Labels stand in another order, and counts of buckets are whole numbers here.
    assert [_plain(line) for line in found] == [_plain(line) for line in expected]


def _plain(line: str) -> object:
    if line.startswith("#"):
        return line.replace('\\"', '"')  # quotes need no escape in a help text
    name, _, rest = line.partition("{")
    labels, _, value = rest.rpartition("} ")
    return name, sorted(labels.split(",")), float(value)


def test_an_exemplar_stands_at_the_bucket_of_its_value_and_in_openmetrics_only() -> None:
    family = Histograms("x_seconds", "long", (), (0.1, 1.0), CONSTANT)
    for value, request_id in ((0.05, "old"), (0.1, "low"), (0.5, "middle"), (7.0, "high")):
        family.observe(value, request_id=request_id)
    (parsed,) = text_string_to_metric_families(text_of(family) + "# EOF\n")
    found = {s.labels["le"]: s.exemplar for s in parsed.samples if "le" in s.labels}
    assert {le: each.labels["request_id"] for le, each in found.items() if each} == {
        "0.1": "low",  # a bound is within its bucket, and the newest is kept
        "1.0": "middle",
        "+Inf": "high",
    }
    assert [each.value for each in found.values() if each] == [0.1, 0.5, 7.0]
    assert "request_id" not in text_of(family, is_openmetrics=False)


def test_what_was_counted_elsewhere_is_told_as_it_is_and_nothing_before_it() -> None:
    family = Histograms("x_seconds", "long", ("kind",), (), CONSTANT)
    family.replace({("old",): Distribution((1.0,), (1, 1), 3.0)})
    text_of(family)
    family.replace({("new",): Distribution((0.5, 2.0), (1, 2, 3), 12.5)})
    (parsed,) = text_string_to_metric_families(text_of(family) + "# EOF\n")
    assert {sample.labels["kind"] for sample in parsed.samples} == {"new"}
    values = {(s.name, s.labels.get("le")): s.value for s in parsed.samples}
    assert values == {
        ("x_seconds_bucket", "0.5"): 1,
        ("x_seconds_bucket", "2.0"): 3,
        ("x_seconds_bucket", "+Inf"): 6,
        ("x_seconds_count", None): 6,
        ("x_seconds_sum", None): 12.5,
    }


@pytest.mark.parametrize("is_openmetrics", [True, False])
def test_a_series_that_changed_since_the_last_scrape_is_told_anew(is_openmetrics: bool) -> None:
    family = Histograms("x_seconds", "long", ("tenant",), (1.0,), CONSTANT)
    for tenant in ("busy", "idle"):
        family.observe(0.5, tenant, request_id="first")
    before = dict(zip(("busy", "idle"), family.lines(is_openmetrics), strict=True))
    family.observe(2.0, "busy", request_id="second")
    after = dict(zip(("busy", "idle"), family.lines(is_openmetrics), strict=True))
    assert after["idle"] == before["idle"]
    assert '_count{model_name="m",tenant="busy"} 2\n' in after["busy"]
    assert '_sum{model_name="m",tenant="busy"} 2.5\n' in after["busy"]
    assert ('request_id="second"' in after["busy"]) == is_openmetrics


def test_a_label_value_that_is_forgotten_leaves_nothing_and_others_stay() -> None:
    numbers = Numbers("counter", "x_total", "n", ("tenant", "mode"), CONSTANT)
    times = Histograms("x_seconds", "long", ("tenant",), (1.0,), CONSTANT)
    for tenant in ("a", "b"):
        numbers.inc(tenant, "off")
        times.observe(0.5, tenant, request_id="r")
    both = text_of(numbers) + text_of(times)
    assert 'tenant="a"' in both
    for family in (numbers, times):
        family.forget("tenant", "a")
        family.forget("mode", "a")  # which is no tenant
    rest = text_of(numbers) + text_of(times)
    assert 'tenant="a"' not in rest
    assert rest.count('tenant="b"') == both.count('tenant="b"') == 5
    times.observe(0.5, "a")
    assert "request_id" not in "".join(line for line in times.lines(True) if '"a"' in line)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0.0"), (True, "1.0"), (1e-5, "1e-05"), (12345678.5, "12345678.5")),
        *((math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN")),
    ],
)
def test_numbers_are_written_as_prometheus_reads_them(value: float, text: str) -> None:
    assert number_text(value) == text
