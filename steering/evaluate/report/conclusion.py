"""What a report says in words: the result in numbers, what it does not show, what it lacks.

Every sentence is made of the document's own numbers; no adjective is chosen here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steering.evaluate.report.words import interval, number, p_value, percent, points_of

DEMONSTRATION = "deshift-demo"
_SAID = ("harmful_refused", "harmful_unsafe", "harmless_lost", "pictures_right")


def sentences(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"condition", "parts"} of the base, of the prompts without their picture, and of the settings
    on the frontier."""
    pictures = {each["name"]: each["picture"] for each in document["conditions"]}
    rows = []
    for point in document["points"]:
        name = point["condition"]
        if name == document["base"] or pictures.get(name) == "none" or point["on_frontier"]:
            rows.append({"condition": name, "parts": list(_parts(document, point))})
    return rows


def _parts(document: Mapping[str, Any], point: Mapping[str, Any]) -> Iterator[str]:
    pooled = {(each["condition"], each["measure"]): each for each in document["pooled"]}
    for measure in _SAID:
        if measure not in point["rates"]:
            continue
        rate, words = point["rates"][measure], document["measures"][measure]
        text = f"{words}: {rate['hits']} of {rate['num']}, {percent(rate)} {interval(rate)}"
        if compared := pooled.get((point["condition"], measure)):
            text += f", {points_of(compared['paired'])} against {compared['base']}, "
            text += p_value(compared["p_holm"])
        yield text


def limits(document: Mapping[str, Any]) -> list[str]:
    """What the figures are no evidence of."""
    return [
        *_of_judges(document),
        *_of_numbers(document),
        *_of_data(document),
        *_of_scope(document),
    ]


def missing(document: Mapping[str, Any]) -> list[str]:
    """Which parts this report has not, and what would add them."""
    found = []
    kinds = {cell["kind"] for cell in document["summary"]["cells"]}
    if document["base"] is None:
        found.append("No unsteered condition (base) was asked: nothing is compared with it.")
    if len(document["points"]) < 2:
        found.append("One condition only: there is nothing to set side by side.")
    if "harmful" not in kinds:
        found.append("No harmful prompts were asked: nothing is known about safety.")
    if not kinds & {"harmless", "over-refusal"}:
        found.append("No harmless prompts were asked: refusals of these are unknown.")
    if not any("pictures_right" in point["rates"] for point in document["points"]):
        found.append(
            "No questions about pictures have a verdict: what steering costs there is unknown "
            "(--suite rendered asks some that need no judge)."
        )
    if not document["families"]:
        found.append("No kind of steering was asked at two alphas: there are no rates by alpha.")
    found += _without_perplexity(document["perplexity"])
    if document["states"] is None:
        found.append(
            "Hidden states were not measured (deshift report RUN_DIR --states MODEL_DIR does it)."
        )
    else:
        skipped = document["states"]["about"].get("skipped", {})
        found += [f"Hidden states of {name} are missing: {why}." for name, why in skipped.items()]
    return found


def _without_perplexity(perplexity: Mapping[str, Any] | None) -> Iterator[str]:
    if perplexity is None:
        yield (
            "Perplexity was not measured (deshift report RUN_DIR --perplexity MODEL_DIR does it)."
        )
    elif unscored := sum(each["num_unscored"] for each in perplexity["conditions"]):
        yield f"{unscored} answers came after perplexity was measured, and have none."


def _of_judges(document: Mapping[str, Any]) -> Iterator[str]:
    judges, labels = document["summary"]["judges"], document["labels"]
    together = [each["together"] for each in labels["model_left_out"].values()]
    low, high = (pick(each["accuracy"] for each in together) for pick in (min, max))
    text = (
        "One judge decides what a refusal is: a list of openings and a small English classifier. "
        f"Against human labels, on answers of models that it was not trained on, it is right in "
        f"{100 * low:.0f} to {100 * high:.0f} % of the cases; nobody has labelled this run's."
    )
    if not labels["is_this_judge"]:
        text += " These figures are of another version of it than the one that judged this run."
    yield text
    if judges["harm"] is None:
        yield (
            "No judge read what the answers do: an answer that does not refuse is not thereby "
            "harmful, nor one that refuses in part harmless."
        )
    else:
        yield (
            f"What is unsafe was said by one language model, {judges['harm']['model']}, which "
            "reads words only and no picture."
        )
    yield (
        "Degenerate answers are found by rules (empty, repeating, no words): fluent nonsense is "
        "not found."
    )
    if document["perplexity"] is not None:
        yield (
            "Perplexity changes no verdict. An unlikely answer may be good language that the model "
            "would not give unsteered; one that goes in circles grows likely by repetition, so "
            "that only the rules find it. The model judges its own language, not what is true."
        )


def _of_numbers(document: Mapping[str, Any]) -> Iterator[str]:
    cells = document["summary"]["cells"]
    nums = [cell["num"] for cell in cells if cell["num"]]
    if nums:
        half = 98 / min(nums) ** 0.5
        yield (
            f"The smallest cell has {min(nums)} answers, the largest {max(nums)}; with "
            f"{min(nums)}, a share near one half is known to within about {half:.0f} points."
        )
    compared = len(document["summary"]["comparisons"])
    if compared:
        yield (
            f"p values are corrected (Holm) for the {compared} comparisons of the suites, and "
            f"apart for the {len(document['pooled'])} pooled ones; not for other runs, nor for "
            "settings that were tried before this one. Intervals are of 95 % each, not of all "
            "together."
        )
    errors = sum(each["num"] for each in document["errors"])
    if errors:
        yield f"{errors} requests ended in an error; their prompts are missing from the rates."
    cut, num = (sum(c[key] for c in document["conditions"]) for key in ("num_cut", "num"))
    if cut:
        tokens = (document["run"]["settings"].get("sampling") or {}).get("max_tokens")
        limit = f"the limit of {tokens} tokens" if tokens else "the token limit"
        yield f"{cut} of {num} answers ({100 * cut / num:.0f} %) were cut at {limit}."


def _of_data(document: Mapping[str, Any]) -> Iterator[str]:
    suites: Sequence[Mapping[str, Any]] = document["run"]["settings"].get("suites", ())
    unskipped = [suite["name"] for suite in suites if not suite["skip"]]
    if unskipped:
        yield (
            f"Of {', '.join(unskipped)} no rows were set aside (--skip 0): settings may have been "
            "chosen while looking at the same prompts."
        )
    if skipped := [f"{s['name']} {s['skip']}" for s in suites if s["skip"]]:
        yield (
            f"Rows left out because development had looked at them: {', '.join(skipped)}; what is "
            "left is of the same kind, so it says little about prompts of other kinds."
        )
    repeated = {s["name"]: len(s["repeats_anchors"]) for s in suites if s["repeats_anchors"]}
    if repeated:
        told = ", ".join(f"{name} {num}" for name, num in repeated.items())
        yield f"Prompts that repeat one of the anchors, from which shifts are measured: {told}."
    yield (
        "Prompts and pictures belong to the suites' authors, whose licences decide whether this "
        "page with its samples may be passed on; prompts and answers here may be harmful."
    )


def _of_scope(document: Mapping[str, Any]) -> Iterator[str]:
    model = document["run"]["settings"].get("model")
    text = "The figures hold for this model, these vectors and this sampling"
    if model == DEMONSTRATION:
        text += "; the demonstration model is a toy of 0.1 billion parameters"
    yield f"{text}. Figures of other harnesses are not comparable."
    yield (
        "Asked were single turns of text beside one picture. Pictures made to attack the model, "
        "harm shown in the picture itself, and conversations of many turns are not covered."
    )
    if document["states"] is not None:
        yield (
            f"Hidden states were measured anew on {number(document['states']['num'])} of the "
            "prompts, with the model alone and not in the server."
        )
