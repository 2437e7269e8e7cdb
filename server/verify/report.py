"""The checks as a table for a terminal and as JSON for a file."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from server.verify.check import Check, is_verified

STYLES = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


def table(checks: Sequence[Check], title: str) -> Table:
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("check", no_wrap=True)
    drawn.add_column("", no_wrap=True)
    drawn.add_column("what was seen")
    for check in checks:
        status = f"[{STYLES[check.status]}]{check.status}[/]"
        drawn.add_row(escape(check.name), status, escape(check.reason))
    return drawn


def as_json(checks: Sequence[Check], circumstances: Mapping[str, Any]) -> str:
    """One object; infinities, which JSON cannot hold, as null."""
    return json.dumps(
        _finite(
            {
                "verified": is_verified(checks),
                "command": sys.argv,
                **circumstances,
                "checks": [
                    {
                        "name": check.name,
                        "status": check.status,
                        "reason": check.reason,
                        "figures": check.figures,
                    }
                    for check in checks
                ],
            }
        ),
        indent=1,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in value]
    return value
