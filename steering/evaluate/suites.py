"""A suite's name and place -> its items: read, checked, de-duplicated, sampled.

Reads the public suites (adapters), JSON Lines of anybody's own, and our own rendered pictures.
Deals no photographs (pictures.py).
"""

import hashlib
import importlib
import io
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering.anchors import AnchorSet, normalised
from steering.demo.pictures import example
from steering.errors import EvaluationError
from steering.evaluate.adapters import ADAPTERS
from steering.evaluate.adapters.rows import Row, read_jsonl
from steering.evaluate.items import KINDS, Item

RENDERED = "rendered"
HUB = "hf:"
_NUMBERS_PER_SEED = 1_000_000  # of rendered pictures

HubRows = Callable[[str], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Suite:
    """spec: as it was asked for. skip: how many of its first rows were left out. available: items
    without those and without repetitions, of which `items` are a seeded sample (None: no end)."""

    name: str
    spec: str
    seed: int
    skip: int
    available: int | None
    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """sha256 over ids, prompts and pictures, in order."""
        parts = "\n".join(f"{item.id}\0{item.kind}\0{item.digest}" for item in self.items)
        return hashlib.sha256(parts.encode()).hexdigest()

    def overlap(self, anchors: AnchorSet) -> list[str]:
        """Ids of the items that repeat an anchor's text."""
        texts = {normalised(anchor.text) for anchor in anchors.anchors}
        return [item.id for item in self.items if normalised(item.prompt) in texts]


def load(spec: str, num: int | None, seed: int) -> list[Item]:
    """The items of `read_suite`, for those who need no more."""
    return list(read_suite(spec, num, seed).items)


def read_suite(
    spec: str, num: int | None, seed: int, *, skip: int = 0, hub: HubRows | None = None
) -> Suite:
    """Read `NAME=PATH` of a public suite, `NAME=hf:ORG/DATASET[/SPLIT]`, `[NAME=]FILE.jsonl`, or
    `rendered`.

    Takes the first `num` of a shuffle that only `seed` and the suite decide, so that a larger
    `num` has the same items first; all that there are if there are fewer. skip: leaves out the
    first rows of the file (pictures by number, of `rendered`), which somebody has looked at. Of
    repeated prompts the first counts. hub: how a hub's rows are read, by default with the package
    `datasets`. Raises EvaluationError, naming file, line and field.
    """
    if spec == RENDERED:
        if num is None:
            raise EvaluationError("suite rendered has no end: say how many (--num)")
        return Suite(RENDERED, spec, seed, skip, None, tuple(_rendered(seed, skip, num)))
    name, place = _split(spec)
    everything = list(_read(name, place, hub or hub_rows))
    _refuse_same_ids(name, everything)
    items = _distinct(everything, skip)
    if not items:
        raise EvaluationError(f"suite {name}: {place} holds no items" + " after skip" * (skip > 0))
    random.Random(f"{seed}:{name}").shuffle(items)
    chosen = items if num is None else items[:num]
    return Suite(name, spec, seed, skip, len(items), tuple(chosen))


def read_suites(
    specs: Sequence[str], num: int | None, seed: int, skips: Callable[[str], int]
) -> list[Suite]:
    """Several; skips: by name. Raises EvaluationError, for two of one name too."""
    found = [read_suite(spec, num, seed, skip=skips(_split(spec)[0])) for spec in specs]
    names = [suite.name for suite in found]
    if len(set(names)) < len(names):
        raise EvaluationError(f"two suites have the same name: {', '.join(names)}")
    return found


def hub_rows(place: str) -> Iterator[dict[str, Any]]:
    """The rows of `ORG/DATASET[/SPLIT]`. Raises EvaluationError."""
    try:  # not among what we install: most read files
        load_dataset = importlib.import_module("datasets").load_dataset
    except ImportError:
        raise EvaluationError(
            f"{HUB}{place}: reading a hub needs the package `datasets`: install it, or download "
            "the file and give its path"
        ) from None
    dataset, split = _hub_place(place)
    try:
        splits = load_dataset(dataset)
    except (OSError, ValueError, RuntimeError) as error:  # not found, not reachable, not readable
        raise EvaluationError(f"{HUB}{place}: {type(error).__name__}: {error}") from None
    if split is None and len(splits) != 1 or split is not None and split not in splits:
        raise EvaluationError(
            f"{HUB}{place}: choose a split, {HUB}{dataset}/SPLIT: {', '.join(splits)}"
        )
    yield from splits[split if split is not None else next(iter(splits))]


def _split(spec: str) -> tuple[str, str]:
    """Name and place. Raises EvaluationError."""
    if spec == RENDERED:
        return RENDERED, ""
    name, equals, place = spec.partition("=")
    if not equals and spec.endswith(".jsonl"):
        return Path(spec).stem, spec
    if not (equals and name and place):
        raise EvaluationError(
            f"suite {spec!r}: write NAME=PATH, FILE.jsonl or rendered; names: {', '.join(ADAPTERS)}"
        )
    if name not in ADAPTERS and (not place.endswith(".jsonl") or name == RENDERED):
        raise EvaluationError(
            f"suite {name!r} is not one of: {', '.join(ADAPTERS)}; a suite of your own is a "
            ".jsonl file"
        )
    return name, place


def _read(name: str, place: str, hub: HubRows) -> Iterator[Item]:
    adapter = ADAPTERS.get(name)
    if adapter is None:
        return (_own(name, row) for row in read_jsonl(Path(place)))
    if not place.startswith(HUB):
        return adapter.items(name, adapter.rows(Path(place)))
    if adapter.needs_files:
        raise EvaluationError(f"suite {name}: its pictures are files: give a folder, not a hub")
    rows = enumerate(hub(place.removeprefix(HUB)), start=1)
    return adapter.items(name, (Row(f"{place}, row {n}", n, values) for n, values in rows))


def _own(suite: str, row: Row) -> Item:
    """{"id", "prompt", "kind"} and optionally "image", relative to the file, "caption", "answers"
    and "meta"."""
    kind = row.text("kind")
    if kind not in KINDS:
        raise row.error("kind", f"is not one of: {', '.join(KINDS)}")
    unknown = row.values.keys() - {"id", "prompt", "kind", "image", "caption", "answers", "meta"}
    if unknown:
        raise row.error(sorted(unknown)[0][:40], "is not known")
    name = row.optional("image")
    image = (row.folder or Path()) / name if name else None
    if image is not None and not image.is_file():
        raise row.error("image", f"names {name}, which is not a file")
    if kind == "visual" and image is None:
        raise row.error("image", "is missing, and the kind is visual")
    meta = row.values.get("meta") or {}
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise row.error("meta", "is not an object of texts")
    return Item(
        id=row.text("id"),
        suite=suite,
        kind=kind,
        prompt=row.text("prompt"),
        image=image,
        caption=row.optional("caption"),
        answers=row.texts("answers"),
        meta=meta,
    )


def _refuse_same_ids(name: str, items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise EvaluationError(f"suite {name}: the id {item.id!r} occurs twice")
        seen.add(item.id)


def _distinct(items: Sequence[Item], skip: int) -> list[Item]:
    """Without repetitions, and then without the first `skip` rows, so that nothing of what was
    skipped comes back under another number."""
    seen: set[tuple[str, Path | bytes | None]] = set()
    kept: list[Item] = []
    for index, item in enumerate(items):
        key = (normalised(item.prompt), item.image)
        if key not in seen and index >= skip:
            kept.append(item)
        seen.add(key)
    return kept


def _rendered(seed: int, skip: int, num: int) -> Iterator[Item]:
    first = seed * _NUMBERS_PER_SEED + skip
    for number in range(first, first + num):
        made = example(number, "unseen")
        encoded = io.BytesIO()
        made.image.save(encoded, "PNG")
        yield Item(
            id=str(number),
            suite=RENDERED,
            kind="visual",
            prompt=made.question.text,
            image=encoded.getvalue(),
            answers=(made.question.key,),
            meta={"question": made.question.kind},
        )


def _hub_place(place: str) -> tuple[str, str | None]:
    parts = place.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise EvaluationError(f"{HUB}{place}: write {HUB}ORG/DATASET or {HUB}ORG/DATASET/SPLIT")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
