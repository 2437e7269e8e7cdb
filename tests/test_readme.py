"""What the README says against what the code does."""

import re
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from typer.testing import CliRunner

from server.cli.main import app
from server.config import PREFIX, Settings
from server.metrics.catalogue import RequestFamilies, StateFamilies

ALL = {
    *("serve", "extract", "vectors", "tenants", "keys", "policy", "audit", "kill", "replicas"),
    *("bench", "demo"),
}
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def settings_table() -> str:
    """The table as it must stand in the README."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        meaning = (field.description or "").replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{PREFIX}{name.upper()}` | {_default(field.default)} | {meaning} |")
    return "\n".join(rows)


def metrics_table() -> str:
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for family in (*RequestFamilies(""), *StateFamilies("")):
        labels = ", ".join(family.labels)
        meaning = family.help_text.replace("|", "\\|")
        rows.append(f"| `{family.name}` | {family.kind} | {labels} | {meaning} |")
    return "\n".join(rows)


def test_the_metrics_table_is_what_is_declared() -> None:
    found = re.search(r"<!-- metrics:.*?-->\n(.*)<!-- end of metrics -->", README, re.DOTALL)
    assert found, "the README has no metrics table"
    assert found.group(1).strip() == metrics_table(), f"write instead:\n\n{metrics_table()}\n"


def _default(value: Any) -> str:
    return "" if value is None else f"`{value}`"


def test_the_settings_table_is_the_settings() -> None:
    found = re.search(r"<!-- settings:.*?-->\n(.*)<!-- end of settings -->", README, re.DOTALL)
    assert found, "the README has no settings table"
    assert found.group(1).strip() == settings_table(), f"write instead:\n\n{settings_table()}\n"


def test_every_choice_of_a_setting_is_named_in_its_meaning() -> None:
    for name, field in Settings.model_fields.items():
        if name == "dtype":  # its values are the number formats' own names
            continue
        for choice in _choices(field.annotation):
            assert str(choice) in str(field.description), f"{name}: {choice}"


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    inner = [a for a in get_args(annotation) if a not in (NoneType, SecretStr)]
    return tuple(choice for each in inner for choice in _choices(each))


def test_every_file_and_command_that_it_names_exists() -> None:
    for path in re.findall(r"`((?:server|steering|tests|deploy|\.ci)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
    runner = CliRunner()
    groups = {"vectors", "tenants", "keys", "policy", "audit"}
    commands = set(re.findall(rf"deshift ({'|'.join(sorted(ALL))})\b", README))
    assert commands == ALL - {"demo"}  # which is `make demo`
    for command in commands:
        assert runner.invoke(app, [command, "--help"]).exit_code == 0
    for line in re.findall(r"^deshift ([^#\n]*)", README, re.MULTILINE):
        command, *arguments = line.split()
        path = [command, *(arguments[:1] if command in groups else [])]
        if path[-1].startswith("-"):  # the group's own command
            path = path[:-1]
        help_text = runner.invoke(app, [*path, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z-]+", line):
            assert option in help_text, f"deshift {' '.join(path)} {option}"


def test_every_make_target_that_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
