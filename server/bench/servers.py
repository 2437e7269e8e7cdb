"""The checkpoint, and the servers that are started on it: Deshift itself, `transformers serve`."""

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from server.bench.footprint import Budget, budget
from server.bench.target import BenchError, Target
from server.config import PREFIX, Settings
from server.process import child_server, free_port

# It needs openai and accelerate beside what Deshift installs: pip install 'deshift[reference]'.
# It batches text models only: chats with a vision-language model run one after the other.
TRANSFORMERS_SERVE = "from transformers.cli.transformers import main; main()"
OURS = "deshift"
PLAIN = "deshift plain-sample"
ALL_CONDITIONS = "off,dataset,sample-cold,sample-warm"
# The paper's way: both extra passes from the first token of every chat, nothing kept.
PLAIN_SAMPLE = {
    f"{PREFIX}PREFIX_CACHE_BYTES": "0",
    f"{PREFIX}VISION_CACHE_BYTES": "0",
}


@dataclass(frozen=True)
class Checkpoint:
    """What our server runs, in which environment, and the conditions that it can be measured in
    ("" : as its settings have it).
    """

    model: Path
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    conditions: str = ""

    def environment(self, num_rows: int, settings: Sequence[tuple[str, str]]) -> dict[str, str]:
        """With a row for each of so many chats, where `env` or `settings` (by field) say nothing
        else, so that none waits for another's end.
        """
        env = {f"{PREFIX}MAX_ROWS": str(num_rows), **self.env}
        return env | {f"{PREFIX}{name.upper()}": value for name, value in settings}


def of_directory(model: Path) -> Checkpoint:
    """Any checkpoint, with this environment's settings."""
    return Checkpoint(model, dict(os.environ))


def of_demo() -> Checkpoint:
    """The demonstration model with its vectors. Raises SteeringError."""
    from server.demo import setup

    env = setup.environment(setup.prepare(setup.cache_dir()))
    return Checkpoint(Path(env[f"{PREFIX}MODEL"]), env, ALL_CONDITIONS)


def of_shape(name: str) -> Checkpoint:
    """A random model, its random vectors in a store of its own.

    Raises BenchError for an unknown name, SteeringError.
    """
    from server.bench import shapes  # torch: seconds
    from server.demo import setup

    if name not in shapes.SHAPES:
        raise BenchError(f"--shape {name} is not one of: {', '.join(shapes.SHAPES)}")
    built = shapes.build(shapes.SHAPES[name], setup.cache_dir())
    url = f"sqlite:///{(built.vectors.parent / 'bench.db').absolute()}"
    vectors = built.vectors.read_bytes()
    asyncio.run(setup.keep(url, vectors, shapes.ALIAS, by="deshift bench"))
    values = {
        "STORE": url,
        "VECTOR_ALIAS": shapes.ALIAS,
        "STEERING_MODE": "dataset",
        "ALPHA": str(shapes.ALPHA),
        "SERVED_MODEL_NAME": name,
        "CLIENT_OVERRIDE": "any",
    }
    env = setup.environment({f"{PREFIX}{key}": value for key, value in values.items()})
    return Checkpoint(built.model, env, ALL_CONDITIONS)


def checkpoint(serve: Path | None, demo: bool, shape: str | None) -> Checkpoint | None:
    """The one that is asked for, if any. Raises BenchError, SteeringError."""
    if sum((serve is not None, demo, shape is not None)) > 1:
        raise BenchError("--serve, --demo and --shape each choose the checkpoint: give one")
    if demo:
        return of_demo()
    if shape:
        return of_shape(shape)
    return of_directory(serve) if serve else None


@dataclass(frozen=True)
class Wanted:
    """What is to be measured. settings: of our servers, by field; urls: of servers that run
    already; steering, models and api_keys: by a server's name.
    """

    serve: Path | None
    demo: bool
    shape: str | None
    dtype: str
    logs: Path
    settings: Sequence[tuple[str, str]]
    plain_sample: bool
    transformers_serve: bool
    generate: bool
    urls: Sequence[tuple[str, str]]
    steering: Mapping[str, str]
    models: Mapping[str, str]
    api_keys: Mapping[str, str] = field(repr=False)

    @property
    def has_others(self) -> bool:
        """Whether anything is to be measured beside our server as its settings have it."""
        others = (self.plain_sample, self.transformers_serve, self.generate)
        return any(others) or bool(self.urls or self.steering)


@dataclass(frozen=True)
class Started:
    """Servers that run, and by process id what memory the settings allow ours."""

    targets: list[Target]
    budgets: dict[int, Budget]


def start(
    stack: ExitStack, checkpoint: Checkpoint | None, wanted: Wanted, *, num_rows: int
) -> Started:
    """The servers on the checkpoint, ours first; they end with `stack`.

    Raises BenchError, ChildError, ConfigError.
    """
    result = Started([], {})
    if checkpoint is None:
        if wanted.plain_sample or wanted.transformers_serve or wanted.settings:
            raise BenchError(
                "--plain-sample, --transformers-serve and --setting need a checkpoint: "
                "give --serve, --demo or --shape"
            )
        return result
    env = checkpoint.environment(num_rows, wanted.settings)
    ours = {OURS: env} | ({PLAIN: env | PLAIN_SAMPLE} if wanted.plain_sample else {})
    for name, environment in ours.items():
        chosen = Settings.from_env(environment)
        allowed = budget(checkpoint.model, chosen, wanted.dtype)
        served = deshift_serve(name, checkpoint.model, wanted.logs, wanted.dtype, environment)
        max_choices = min(chosen.max_n, chosen.max_rows)
        target = replace(stack.enter_context(served), max_choices=max_choices)
        if name == PLAIN:  # whatever policy the store has
            target = replace(target, extra={"steering": {"mode": "sample"}})
        result.targets.append(target)
        result.budgets[target.pid] = allowed
    if wanted.transformers_serve:
        reference = transformers_serve(checkpoint.model, wanted.logs, wanted.dtype)
        result.targets.append(stack.enter_context(reference))
    return result


@contextmanager
def transformers_serve(model: Path, logs: Path, dtype: str) -> Iterator[Target]:
    """`transformers serve` on a free loopback port, pinned to `model`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", TRANSFORMERS_SERVE, "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    log = logs / "transformers-serve.log"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with child_server(command, ready_url=f"{url}/health", log=log, env=env) as process:
        yield Target("transformers", url, model=str(model), pid=process.pid)


@contextmanager
def deshift_serve(
    name: str,
    model: Path,
    logs: Path,
    dtype: str,
    env: Mapping[str, str],
    *,
    admin_port: int = 0,
    api_key: str = "",
) -> Iterator[Target]:
    """This server on a free loopback port, in the environment `env`; its log is `name`'s.

    admin_port: 0 takes any free one. api_key: what it is to be asked with.
    """
    port, admin_port = free_port(), admin_port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    log = logs / f"{name.replace(' ', '-')}.log"
    env = {**env, f"{PREFIX}ADMIN_PORT": str(admin_port)}
    with child_server(command, ready_url=f"{url}/ready", log=log, env=env) as process:
        admin_url = f"http://127.0.0.1:{admin_port}"
        yield Target(name, url, api_key=api_key, pid=process.pid, admin_url=admin_url)
