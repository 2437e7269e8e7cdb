"""The public suites by name: how their files are read, and what a row becomes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from steering.errors import EvaluationError
from steering.evaluate.adapters import pictured, texts
from steering.evaluate.adapters.rows import (
    Row,
    read_csv,
    read_json_list,
    read_json_table,
    read_jsonl,
    with_fields,
)
from steering.evaluate.items import Item


@dataclass(frozen=True)
class Adapter:
    """rows: a published file or folder -> its rows. item: a row -> an item without the name of its
    suite, or None for a row that belongs to another suite. fields: what every row must have.
    needs_files: a hub's rows, which have no pictures beside them, are not enough.
    """

    rows: Callable[[Path], Iterable[Row]]
    item: Callable[[Row], Item | None]
    fields: tuple[str, ...]
    needs_files: bool = False

    def items(self, suite: str, rows: Iterable[Row]) -> Iterator[Item]:
        """Raises EvaluationError, naming the row and the field."""
        for row in with_fields(rows, self.fields):
            item = self.item(row)
            if item is not None:
                yield replace(item, suite=suite)


def _mm_safetybench_rows(path: Path) -> Iterator[Row]:
    """One scenario's file, or the folder of all; the scenario is the file's name."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise EvaluationError(f"{path}: no .json file; give MM-SafetyBench's processed_questions")
    for file in files:
        for row in read_json_table(file):
            yield replace(row, values={**row.values, "scenario": file.stem})


_XSTEST = ("id", "prompt", "type", "label")
ADAPTERS: dict[str, Adapter] = {
    "vlsafe": Adapter(read_jsonl, texts.vlsafe, ("image_id", "query")),
    "advbench": Adapter(read_csv, texts.advbench, ("goal",)),
    "jailbreakllms": Adapter(
        read_csv,
        texts.jailbreakllms,
        ("content_policy_id", "content_policy_name", "q_id", "question"),
    ),
    "xstest": Adapter(read_csv, texts.xstest_safe, _XSTEST),
    "xstest-unsafe": Adapter(read_csv, texts.xstest_unsafe, _XSTEST),
    "alpaca": Adapter(read_json_list, texts.alpaca, ("instruction",)),
    "mm-safetybench": Adapter(
        _mm_safetybench_rows, texts.mm_safetybench, ("key", "scenario", "Question")
    ),
    "figstep": Adapter(
        pictured.figstep_rows,
        pictured.figstep,
        ("category_id", "task_id", "instruction"),
        needs_files=True,
    ),
    "llava-bench-coco": Adapter(
        pictured.llava_bench_rows,
        pictured.llava_bench,
        ("question_id", "image", "text", "category"),
        needs_files=True,
    ),
}
