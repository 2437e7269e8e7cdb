"""The demonstration on a terminal: the table, and what to try next."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from server.demo.cases import MODEL_NAME, Case, Shown

PYTHON = """\
import base64, openai  # pip install openai
photo = base64.b64encode(open("{photo}", "rb").read()).decode()
client = openai.OpenAI(base_url="{url}/v1", api_key="none")
answer = client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": [
        {{"type": "image_url", "image_url": {{"url": f"data:image/jpeg;base64,{{photo}}"}}}},
        {{"type": "text", "text": {question}}}]}}],
    max_tokens=60, temperature=0,
    extra_body={{"steering": {{"mode": "off"}}}},  # leave this line out: steered
)
print(answer.choices[0].message.content)"""


def table(rows: Sequence[Shown]) -> Table:
    """Every answer verbatim, as the running server gave it."""
    result = Table(title="Answers of the running server, verbatim", show_lines=True, expand=True)
    result.add_column("request", ratio=3)
    result.add_column("answer", ratio=6)
    result.add_column("x-deshift-steering", ratio=4, overflow="fold")
    result.add_column("s", justify="right")
    for row in rows:
        asked = Text(f"{row.case.title}\n", style="bold")
        asked.append(f"“{row.case.question}”\npicture: {row.case.picture}", style="not bold")
        result.add_row(asked, Text(row.answer), Text(row.steering), f"{row.seconds:.2f}")
    return result


def next_steps(url: str, folder: Path, photo: bytes, case: Case) -> str:
    """Write the files that the snippets name into `folder`; return the snippets."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "photo.jpg").write_bytes(photo)
    (folder / "request.json").write_text(json.dumps(case.body(MODEL_NAME)))
    curl = (
        f"curl -s {url}/v1/chat/completions -H 'content-type: application/json' "
        f"-d @{folder / 'request.json'}"
    )
    python = PYTHON.format(
        url=url, photo=folder / "photo.jpg", model=MODEL_NAME, question=json.dumps(case.question)
    )
    return (
        f"\nServing {MODEL_NAME} on {url}/v1; Ctrl-C ends it. The steered request again:\n\n"
        f"{curl}\n\nUnsteered, with the official Python client:\n\n{python}\n"
    )
