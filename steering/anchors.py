"""Anchor sets: the prompts that shift vectors are computed from.

Covers reading, checking and fingerprinting a set. Does not run a model on it (extract.py).
Reads JSON Lines files; a hub data set is exported to one first.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal, cast

from steering.errors import AnchorError

Label = Literal["harmful", "harmless"]
SHIPPED = "deshift"
_SHIPPED_FILE = "data/anchors.jsonl"


@dataclass(frozen=True)
class Anchor:
    """One prompt. topic and form are for people who balance a set."""

    id: str
    label: Label
    text: str
    topic: str = ""
    form: str = ""


@dataclass(frozen=True)
class AnchorSet:
    """Anchors with a name; no two alike. Raises AnchorError for an empty set or a repetition."""

    name: str
    anchors: tuple[Anchor, ...]

    def __post_init__(self) -> None:
        if not self.anchors:
            raise AnchorError(f"anchor set {self.name}: empty")
        seen: dict[str, str] = {}
        ids: set[str] = set()
        for anchor in self.anchors:
            twin = seen.setdefault(normalised(anchor.text), anchor.id)
            if twin != anchor.id:
                raise AnchorError(
                    f"anchor set {self.name}: {anchor.id} has the same text as {twin}"
                )
            if anchor.id in ids:
                raise AnchorError(f"anchor set {self.name}: the id {anchor.id} occurs twice")
            ids.add(anchor.id)

    def __len__(self) -> int:
        return len(self.anchors)

    @cached_property
    def digest(self) -> str:
        """sha256 over labels and texts; neither the order nor ids, topics and forms matter."""
        content = sorted([anchor.label, _canonical(anchor.text)] for anchor in self.anchors)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def count(self, label: Label) -> int:
        return sum(anchor.label == label for anchor in self.anchors)

    def refuse_unbalanced(self) -> None:
        """Raise AnchorError unless harmful and harmless prompts are equal in number."""
        harmful, harmless = self.count("harmful"), self.count("harmless")
        if harmful != harmless:
            raise AnchorError(
                f"anchor set {self.name}: {harmful} harmful and {harmless} harmless prompts; "
                "make them equal in number"
            )

    def refuse_overlap(self, evaluation_prompts: Iterable[str]) -> None:
        """Raise AnchorError if an anchor repeats a prompt that the result is evaluated on."""
        evaluated = {normalised(prompt) for prompt in evaluation_prompts}
        shared = [anchor.id for anchor in self.anchors if normalised(anchor.text) in evaluated]
        if shared:
            raise AnchorError(
                f"anchor set {self.name}: {len(shared)} of {len(self)} anchors repeat evaluation "
                f"prompts, first {', '.join(shared[:5])}; take them out"
            )


def load_anchors(path: Path | None = None, *, balanced: bool = True) -> AnchorSet:
    """Read a JSON Lines file, or the set that ships with the package.

    A row is {"label": "harmful" | "harmless", "text"} and optionally "id", "topic", "form".
    The set's name is the file's without its ending. Raises AnchorError, naming the row.
    """
    if path is None:
        name, text = SHIPPED, resources.files("steering").joinpath(_SHIPPED_FILE).read_text("utf-8")
    else:
        name, text = path.stem, _read(path)
    rows = enumerate(text.splitlines(), start=1)
    anchors = tuple(_anchor(name, number, row) for number, row in rows if row.strip())
    anchor_set = AnchorSet(name, anchors)
    if balanced:
        anchor_set.refuse_unbalanced()
    return anchor_set


def normalised(text: str) -> str:
    """The form in which two prompts count as the same: case, spacing, outer punctuation apart."""
    words = _canonical(unicodedata.normalize("NFKC", text)).casefold()
    return words.strip(" .,;:!?\"'")


def _canonical(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise AnchorError(f"anchor file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise AnchorError(f"anchor file {path}: not UTF-8 text ({error})") from error


def _anchor(name: str, number: int, row: str) -> Anchor:
    where = f"anchor set {name}, row {number}"
    try:
        values = json.loads(row)
    except ValueError as error:
        raise AnchorError(f"{where}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise AnchorError(f"{where}: not a JSON object")
    fields = {"id": f"row-{number}", "topic": "", "form": ""} | values
    for field in ("id", "label", "text", "topic", "form"):
        if not isinstance(fields.get(field), str):
            raise AnchorError(f"{where}: {field!r} is missing or not a string")
    if fields["label"] not in ("harmful", "harmless"):
        raise AnchorError(f"{where}: label {fields['label']!r} is not 'harmful' or 'harmless'")
    if not fields["text"].strip():
        raise AnchorError(f"{where}: the text is empty")
    label = cast(Label, fields["label"])
    return Anchor(fields["id"], label, fields["text"], fields["topic"], fields["form"])
