"""Our own prompts for choosing a strength, and the split of suites into search and confirmation.

Nothing that the shift vectors were made of may be used to choose their strength: of every suite,
items that repeat an anchor which ships are left out. The prompts here are none of the anchors.
Most of them taught the demonstration model to refuse in text, so that on that model only those
kept from its training count (`held-out`); for any other model all may be used (`development`).
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from steering.anchors import AnchorSet, load_anchors
from steering.demo.train_text import PROMPTS, is_held_out
from steering.errors import EvaluationError
from steering.evaluate.calibration import Items
from steering.evaluate.items import Item, Kind
from steering.evaluate.pictures import Photos, check
from steering.evaluate.suites import RENDERED, Suite, read_suite

DEVELOPMENT = "development"
HELD_OUT = "held-out"
_KINDS: tuple[Kind, ...] = ("harmful", "harmless")


def read(specs: Sequence[str], num: int, seed: int) -> list[Suite]:
    """`development`, `held-out` (two suites each) and whatever `read_suite` reads; without the
    items that repeat an anchor. Raises EvaluationError."""
    anchors = load_anchors()
    found: list[Suite] = []
    for spec in specs:
        if spec in (DEVELOPMENT, HELD_OUT):
            found += [_own(spec, kind, num, seed) for kind in _KINDS]
        else:
            found.append(read_suite(spec, num, seed))
    names = [suite.name for suite in found]
    if len(set(names)) < len(names):
        raise EvaluationError(f"two suites have the same name: {', '.join(names)}")
    suites = [_without_anchors(suite, anchors) for suite in found]
    items = [item for suite in suites for item in suite.items]
    if not any(item.kind == "harmful" for item in items):
        raise EvaluationError("no suite has harmful prompts: there is nothing to calibrate")
    check(items)
    return suites


def split(suites: Sequence[Suite], num: int, confirm: int, said: Callable[[str], None]) -> Items:
    """The first `num` of each for the search, the next `confirm` for the confirmation. A suite
    with too few for both keeps up to half of them for the confirmation, which is `said`. Raises
    EvaluationError."""
    search, fresh = [], []
    for suite in suites:
        have, wanted = len(suite.items), num
        if have < num + confirm:
            half = -(-have // 2) if confirm else have
            wanted = min(num, max(half, have - confirm))
            left = min(confirm, have - wanted)
            said(f"{suite.name}: {have} prompts, {wanted} to search with, {left} to confirm with")
        if confirm and have - wanted < 1:
            raise EvaluationError(f"suite {suite.name}: one prompt is too few to confirm anything")
        search.append(suite.items[:wanted])
        fresh.append(suite.items[wanted : wanted + confirm])
    return Items(tuple(search), tuple(fresh))


def dealt(suites: Sequence[Suite], pictures: Photos, seed: int) -> list[Suite]:
    """With a picture for every item."""
    return [pictures.dealt(suite, seed) for suite in suites]


def default(is_demo: bool) -> list[str]:
    """The suites that are asked where none are named."""
    return [HELD_OUT if is_demo else DEVELOPMENT, RENDERED]


def _own(spec: str, kind: Kind, num: int, seed: int) -> Suite:
    lines = (PROMPTS / f"{kind}.jsonl").read_text("utf-8").splitlines()
    name = f"{spec}-{kind}"
    items = [
        Item(f"{kind}-{number}", name, kind, text)
        for number, text in enumerate((json.loads(line)["text"] for line in lines), start=1)
        if spec == DEVELOPMENT or is_held_out(text)
    ]
    random.Random(f"{seed}:{name}").shuffle(items)
    return Suite(name, spec, seed, 0, len(items), tuple(items[:num]))


def _without_anchors(suite: Suite, anchors: AnchorSet) -> Suite:
    repeated = set(suite.overlap(anchors))
    return replace(suite, items=tuple(item for item in suite.items if item.id not in repeated))
