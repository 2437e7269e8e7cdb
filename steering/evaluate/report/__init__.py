"""The report of a judged run: RUN_DIR/report.json, and RUN_DIR/report.html for people.

One page that loads nothing and needs no script. Needs matplotlib (the extra `eval`).
"""

import json
from pathlib import Path

from steering.evaluate.report.document import document
from steering.evaluate.report.page import render
from steering.evaluate.summary import BASE


def write(run_dir: Path, base: str = BASE) -> Path:
    """Write both files, each whole or not at all; the page's place. base: what the other
    conditions are compared with. Raises EvaluationError: not a run, or not judged."""
    found = document(run_dir, base)
    _replace(run_dir / "report.json", json.dumps(found, indent=1) + "\n")
    page = run_dir / "report.html"
    # From what was written: the page can say nothing that report.json does not.
    _replace(page, render(json.loads((run_dir / "report.json").read_text("utf-8"))))
    return page


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)
