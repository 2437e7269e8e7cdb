"""The import law, read from the source: who may import whom."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "steering")
WEB = {
    "fastapi",
    "starlette",
    "pydantic",
    "pydantic_settings",
    "redis",
    "prometheus_client",
    "uvicorn",
}
# What may be imported by one part only: the prefix, and who it is for.
WIRING = {
    "server.app": ("server.app", "server.serve", "server.cli"),
    "server.serve": ("server.serve", "server.cli"),
    "server.cli": ("server.cli",),
    "server.engine.engine": ("server.engine", "server.app", "server.serve", "server.cli"),
    "server.engine.runner": ("server.engine", "server.app", "server.serve", "server.cli"),
    "server.bench": ("server.bench", "server.verify", "server.cli"),
    "server.demo": ("server.demo", "server.bench", "server.cli"),
    "prometheus_client": ("server.metrics",),
    "server.routes": ("server.routes", "server.app", "server.admin.app"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(name: str, *, typing_too: bool) -> set[str]:
    """The modules that `name` imports anywhere in its text, also within functions."""
    return set(_walk(ast.parse(FILES[name].read_text()), name, typing_too))


def _walk(node: ast.AST, name: str, typing_too: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            if not typing_too:
                continue
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{name}: relative import; write it from the package down"
            assert child.module is not None
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield inner if inner in FILES else child.module
        yield from _walk(child, name, typing_too)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def reachable(name: str) -> dict[str, str]:
    """Every module that importing `name` may load, with the module that imports it."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        for target in sorted(imports(current, typing_too=False)):
            if target not in found:
                found[target] = current
                if target in FILES:
                    waiting.append(target)
    return found


STEERING = [name for name in FILES if within(name, "steering")]
ENGINE = [name for name in FILES if within(name, "server.engine")]


def test_there_are_modules_to_judge() -> None:
    assert STEERING and ENGINE


@pytest.mark.parametrize("name", STEERING)
def test_steering_knows_neither_the_server_nor_http(name: str) -> None:
    for target in imports(name, typing_too=True):
        assert not within(target, "server"), f"{name} imports {target}"
        assert target.split(".")[0] not in WEB - {"redis"}, f"{name} imports {target}"


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_reaches_no_web_library(name: str) -> None:
    """Neither itself nor through a module of ours that it imports."""
    for target, importer in reachable(name).items():
        assert target.split(".")[0] not in WEB, f"{name} reaches {target} through {importer}"


@pytest.mark.parametrize("name", FILES)
def test_only_the_factory_and_the_commands_import_everything(name: str) -> None:
    for target in imports(name, typing_too=False):
        for prefix, allowed in WIRING.items():
            if within(target, prefix):
                assert any(within(name, who) for who in allowed), f"{name} imports {target}"


def test_there_are_no_cycles() -> None:
    graph = {name: imports(name, typing_too=False) & FILES.keys() - {name} for name in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_only_known_packages_are_imported() -> None:
    """What is imported is declared in pyproject.toml, is ours or is Python's own."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        requirement.split(">")[0].split("[")[0].replace("-", "_")
        for requirement in project["dependencies"] + extras["eval"] + extras["otel"]
    }
    renamed = {
        "pillow": "PIL",
        "accelerate": "accelerate",
        "opentelemetry_sdk": "opentelemetry",
        "python_json_logger": "pythonjsonlogger",
    }
    known = {renamed.get(name, name) for name in declared} | set(PACKAGES) | sys.stdlib_module_names
    # starlette is FastAPI's base, typing_extensions pydantic's; huggingface_hub is transformers'.
    known |= {"starlette", "huggingface_hub", "typing_extensions"}
    for name in FILES:
        for target in imports(name, typing_too=True):
            assert target.split(".")[0] in known, f"{name} imports undeclared {target}"
