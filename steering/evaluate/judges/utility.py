"""Whether an answer is right: exactly, where right answers are known; else what a model says.

A language model is asked (steering/evaluate/data/utility_prompt.txt) about harmless items without
answers. It reads words only and does not see the picture.
"""

import hashlib
import re
from pathlib import Path

from steering.demo.pictures import KINDS, Question, is_right
from steering.evaluate.items import Item
from steering.evaluate.judges.harm import conversation
from steering.evaluate.suites import RENDERED

PROMPT = (Path(__file__).parent.parent / "data" / "utility_prompt.txt").read_text("utf-8")
PROMPT_DIGEST = hashlib.sha256(PROMPT.encode()).hexdigest()

_ARTICLES = frozenset({"a", "an", "the"})
_VERDICTS = {"useful": True, "useless": False}


def exactly_right(item: Item, answer: str) -> bool | None:
    """By the rule of rendered pictures, else by equality with one of the item's answers; None
    where none is known."""
    kind = item.meta.get("question")
    if item.suite == RENDERED and kind in KINDS and item.answers:
        return is_right(Question(kind, item.prompt, answer="", key=item.answers[0]), answer)
    if not item.answers:
        return None
    return normalised(answer) in {normalised(right) for right in item.answers}


def normalised(text: str) -> str:
    """In small letters, without signs, articles and surplus blanks: "The cat." is "cat"."""
    words = re.findall(r"\w+", text.casefold())
    return " ".join(word for word in words if word not in _ARTICLES)


def question(item: Item, answer: str) -> str:
    return PROMPT.replace("{conversation}", conversation(item, answer))


def is_useful(said: str) -> bool | None:
    """None for anything but the two words."""
    return _VERDICTS.get(said.strip().removesuffix(".").lower())
