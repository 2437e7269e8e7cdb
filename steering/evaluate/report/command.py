"""The command that repeats a run, put together from what run.json says."""

import shlex
from collections.abc import Mapping
from typing import Any

from steering.errors import EvaluationError
from steering.evaluate.conditions import OFF, parse_all


def command(run: Mapping[str, Any]) -> list[str]:
    """Its lines, to be joined with a backslash. A folder's or a key's place is in capitals where
    run.json does not tell it."""
    settings, start = run["settings"], (run.get("starts") or [{}])[0]
    suites = settings.get("suites", ())
    specs = start.get("suites") or [suite["name"] for suite in suites]
    lines = ["deshift eval", f"--out RUN_DIR {_server(settings, start)}"]
    lines += [f"--suite {shlex.quote(spec)}" for spec in specs]
    skips = [f"--skip {shlex.quote(s['name'])}={s['skip']}" for s in suites if s["skip"]]
    lines += [" ".join(skips)] if skips else []
    lines += _conditions(settings.get("conditions", ()))
    photos = start.get("photos", "rendered")
    lines += [] if photos == "rendered" else [f"--photos {shlex.quote(photos)}"]
    num = max((suite["num"] for suite in suites), default=0)
    sampling = settings.get("sampling") or {}
    options = {
        "num": num or None,
        "seed": sampling.get("seed"),
        "max-tokens": sampling.get("max_tokens"),
        "concurrency": start.get("concurrency"),
    }
    lines.append(
        " ".join(f"--{key} {value}" for key, value in options.items() if value is not None)
    )
    return [line for line in lines if line]


def _server(settings: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    if settings.get("checkpoint") is None:
        model = settings.get("model")
        return f"--url {shlex.quote(start.get('url') or 'URL')}" + (
            f" --model {shlex.quote(model)}" if model else ""
        )
    return str(start.get("server") or "--serve MODEL_DIR")


def _conditions(conditions: Any) -> list[str]:
    """The README's set by its name; others by what they ask for, whatever they are called."""
    try:
        table = {each.name: each.steering for each in parse_all((), table=True)}
    except EvaluationError:
        table = {}
    asked = {each["name"]: each["steering"] for each in conditions}
    is_table = bool(table) and all(
        name in asked and asked[name] == (dict(wanted) if wanted else wanted)
        for name, wanted in table.items()
    )
    lines = ["--conditions-set table"] if is_table else []
    rest = [each for each in conditions if not (is_table and each["name"] in table)]
    return lines + [f"--condition {shlex.quote(_text(each))}" for each in rest]


def _text(condition: Mapping[str, Any]) -> str:
    """As conditions.parse reads it."""
    picture, steering = condition["picture"], condition["steering"]
    if picture == "own":
        if steering is None or steering == OFF:
            return "served" if steering is None and condition["name"] != "base" else "base"
        fields = ",".join(f"{k}={v}" for k, v in steering.items() if k != "mode")
        return f"{steering['mode']}:{fields}" if fields else str(steering["mode"])
    return {"none": "text-only"}.get(picture, str(picture))
