"""Write dashboards/*.json, which is all that Grafana is given.

    python -m deploy.grafana.build

Edit source/ and run this; a test compares. To keep a change made in Grafana's editor, repeat it
there: the files are not read back.
"""

import json
from pathlib import Path

from deploy.grafana.source import fleet, serving, steering_overhead
from deploy.grafana.source.board import Board

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = {
    "steering-overhead": steering_overhead.dashboard,
    "serving": serving.dashboard,
    "fleet": fleet.dashboard,
}


def text_of(board: Board) -> str:
    return json.dumps(board.json(), indent=2, ensure_ascii=False) + "\n"


def write() -> None:
    for name, make in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(text_of(make()), encoding="utf-8")


if __name__ == "__main__":
    write()
