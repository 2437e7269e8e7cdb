"""A run's folder: what was asked, under which settings, and every answer as soon as it is there.

run.json: `settings`, everything that decides the answers and is the same whenever the run goes on,
and `starts`, one entry for each time that it was begun or resumed (when, where, versions).
items.jsonl: prompts, digests, places of pictures. answers.jsonl: one line an answer; where an
error was asked again there are two lines, and the later one counts. Judges nothing.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steering.errors import EvaluationError
from steering.evaluate.adapters.rows import Row, read_jsonl, read_text
from steering.evaluate.items import Item, Kind, picture_bytes

FORMAT = 1
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Answer:
    """One line of answers.jsonl. steering: what the server says it did, None where it says
    nothing. seconds: of the attempt that was answered. error: why there is no answer."""

    condition: str
    suite: str
    kind: Kind
    id: str
    digest: str
    answer: str
    finish_reason: str | None
    steering: Mapping[str, Any] | None
    seconds: float
    error: str | None = None

    @property
    def key(self) -> Key:
        return (self.condition, self.suite, self.id)


class RunDir:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(
        self,
        settings: Mapping[str, Any],
        start: Mapping[str, Any],
        items: Sequence[Item],
        *,
        resume: bool,
    ) -> None:
        """Make the folder, or check that the run in it is this one.

        Raises EvaluationError: it holds something else; it holds a run and `resume` is not asked
        for; that run had other settings, of which the message names the first ones.
        """
        settings = _as_read(settings)
        run = self.path / "run.json"
        if run.exists():
            if not resume:
                raise EvaluationError(
                    f"{self.path} holds a run already: give --resume, or another folder"
                )
            document = self._document()
            if found := list(_differences(document["settings"], settings, "")):
                raise EvaluationError(
                    f"{self.path} holds a run with other settings: {'; '.join(found[:5])}"
                )
            document["starts"].append(_as_read(start))
        else:
            if self.path.exists() and any(self.path.iterdir()):
                raise EvaluationError(f"{self.path} is not empty and holds no run")
            self._write_items(items)
            document = {"format": FORMAT, "settings": settings, "starts": [_as_read(start)]}
        _replace(run, json.dumps(document, indent=1))

    def settings(self) -> dict[str, Any]:
        """Raises EvaluationError."""
        return dict(self._document()["settings"])

    def items(self) -> list[Item]:
        """As they were asked, each with its picture. Raises EvaluationError, naming the line."""
        return [self._item(row) for row in self._item_rows()]

    def _item_rows(self) -> Iterator[Row]:
        return read_jsonl(self.path / "items.jsonl")

    def answers(self) -> list[Answer]:
        """The last line of each, in the order of conditions, suites and prompts.
        A torn last line is none. Raises EvaluationError, naming the line that is no answer."""
        path = self.path / "answers.jsonl"
        if not path.exists():
            return []
        whole = read_text(path).rpartition("\n")[0]
        found: dict[Key, Answer] = {}
        for number, line in enumerate(whole.split("\n") if whole else [], start=1):
            try:
                answer = Answer(**json.loads(line))
            except (TypeError, ValueError):
                raise EvaluationError(f"{path}, line {number}: not an answer") from None
            found[answer.key] = answer
        return self._in_order(found)

    def _in_order(self, found: Mapping[Key, Answer]) -> list[Answer]:
        """As run.json and items.jsonl have it; what neither names comes last."""
        if not found:
            return []
        named = [condition["name"] for condition in self.settings().get("conditions", ())]
        conditions = {name: place for place, name in enumerate(named)}
        rows = enumerate(self._item_rows())
        items = {(row.text("suite"), row.text("id")): place for place, row in rows}

        def place(answer: Answer) -> tuple[int, int]:
            item = items.get((answer.suite, answer.id), len(items))
            return conditions.get(answer.condition, len(conditions)), item

        return sorted(found.values(), key=place)

    @contextmanager
    def appending(self) -> Iterator[Callable[[Answer], None]]:
        """Cut a torn last line, then append answers, each at once and whole.

        Raises EvaluationError while another process appends.
        """
        with (self.path / "answers.jsonl").open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EvaluationError(f"another process goes on with {self.path}") from None
            _cut_torn_line(file.fileno())

            def append(answer: Answer) -> None:
                file.write(json.dumps(asdict(answer)).encode() + b"\n")
                file.flush()

            yield append

    def _document(self) -> dict[str, Any]:
        path = self.path / "run.json"
        try:
            document = json.loads(read_text(path))
        except ValueError:
            raise EvaluationError(f"{path}: not JSON") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise EvaluationError(f"{path}: not a run of this version (format {FORMAT})")
        return document

    def _write_items(self, items: Sequence[Item]) -> None:
        (self.path / "pictures").mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(self._as_line(item)) + "\n" for item in items]
        _replace(self.path / "items.jsonl", "".join(lines))

    def _as_line(self, item: Item) -> dict[str, Any]:
        image = item.image
        if isinstance(image, bytes):  # it lies nowhere else
            image = Path("pictures", f"{item.picture_digest}.png")
            (self.path / image).write_bytes(picture_bytes(item.image or b""))
        elif image is not None:
            image = image.absolute()
        return {
            **{name: getattr(item, name) for name in ("id", "suite", "kind", "prompt", "caption")},
            "answers": list(item.answers),
            "meta": dict(item.meta),
            "image": None if image is None else str(image),
            "picture_digest": item.picture_digest,
            "digest": item.digest,
        }

    def _item(self, row: Row) -> Item:
        image = row.optional("image")
        return Item(
            id=row.text("id"),
            suite=row.text("suite"),
            kind=row.values["kind"],
            prompt=row.text("prompt"),
            image=self.path / image if image else None,
            caption=row.optional("caption"),
            answers=row.texts("answers"),
            meta=row.values["meta"],
        )


def _cut_torn_line(descriptor: int) -> None:
    """What a killed process left behind its last line's end goes."""
    size = os.fstat(descriptor).st_size
    content = os.pread(descriptor, size, 0)
    os.ftruncate(descriptor, content.rfind(b"\n") + 1)


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, whenever the process is killed."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)


def _as_read(value: Mapping[str, Any]) -> Any:
    """As it comes back from the file: tuples are lists there."""
    return json.loads(json.dumps(value))


def _differences(there: Any, here: Any, path: str) -> Iterator[str]:
    """`sampling.max_tokens is 32 there and 64 here`, one for each value that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in dict.fromkeys([*there, *here]):  # in the order of the file
            below = f"{path}.{name}" if path else name
            yield from _differences(there.get(name), here.get(name), below)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, (one, other) in enumerate(zip(there, here, strict=True)):
            label = one.get("name", index) if isinstance(one, dict) else index
            yield from _differences(one, other, f"{path}[{label}]")
    elif there != here:
        yield f"{path} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
