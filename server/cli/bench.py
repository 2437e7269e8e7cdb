"""`deshift bench`: any OpenAI-compatible servers side by side, with pictures, interleaved."""

import asyncio
import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from server.bench import machine, report, servers
from server.bench.load import Burst, Load, measure
from server.bench.target import BenchError, Target, resolved
from server.process import ChildError

LONGEST_ANSWER_S = 600.0
WIDTH = 120  # where no terminal says its own


def bench(
    url: Annotated[
        list[str] | None,
        typer.Option(help="A server: name=http://host:port (repeatable).", metavar="NAME=URL"),
    ] = None,
    serve: Annotated[
        Path | None,
        typer.Option(
            help="Also start this server, with the settings of the environment, on a checkpoint.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    transformers_serve: Annotated[
        Path | None,
        typer.Option(
            help="Also start `transformers serve` on a checkpoint.", exists=True, file_okay=False
        ),
    ] = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo", help="Start both on the demonstration model, steered as recommended."
        ),
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A server's model; by default the first it lists.", metavar="NAME=MODEL"),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A server's API key.", metavar="NAME=KEY"),
    ] = None,
    steering: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure a Deshift server several times: off, dataset (the server's alpha) or an "
            "alpha each, for example deshift=off,dataset,0.2.",
            metavar="NAME=SETTING,...",
        ),
    ] = None,
    streams: Annotated[str, typer.Option(help="Numbers of chats at once.")] = "1,4,16",
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before them, not counted.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    image: Annotated[
        Path | None, typer.Option(help="A picture; by default the photograph that ships.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the pictures' patches.")] = 0,
    dtype: Annotated[str, typer.Option(help="Number format of started servers.")] = "bfloat16",
    baseline: Annotated[
        str | None, typer.Option(help="Server that ratios refer to; by default the first.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write every figure here.")
    ] = None,
    logs: Annotated[Path, typer.Option(help="Directory for the logs of started servers.")] = Path(
        ".deshift/bench"
    ),
) -> None:
    """Measure throughput, time to first token and inter-token latency of servers side by side.

    All get the same pictures and questions, in rounds that take the servers in turn. Servers
    that know `ignore_eos` (or, as `transformers serve`, a generation config) produce exactly
    --max-tokens tokens; for others the number they report is shown.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    load = Load(_image(image), max_tokens, seed)
    numbers = _numbers(streams)
    try:
        with contextlib.ExitStack() as started:
            targets = [
                Target(name, value.rstrip("/").removesuffix("/v1")) for name, value in _pairs(url)
            ]
            env: Mapping[str, str] | None = None
            if demo:
                from server.demo import setup

                console.print("Building the demonstration model")
                env = setup.environment(setup.prepare(setup.cache_dir()))
                serve = transformers_serve = Path(env["DESHIFT_MODEL"])
            if serve:
                console.print(f"Starting deshift on {serve}")
                targets.append(
                    started.enter_context(servers.deshift_serve(serve, logs, dtype, env))
                )
            if transformers_serve:
                console.print(f"Starting transformers serve on {transformers_serve}")
                targets.append(
                    started.enter_context(
                        servers.transformers_serve(transformers_serve, logs, dtype)
                    )
                )
            targets = _configured(targets, dict(_pairs(model)), dict(_pairs(api_key)))
            targets = _variants(targets, dict(_pairs(steering)))
            if not targets:
                raise BenchError(
                    "nothing to measure: give --url, --serve, --transformers-serve or --demo"
                )
            base = baseline or targets[0].name
            if base not in {target.name for target in targets}:
                raise BenchError(f"--baseline {base} is none of the servers")
            before = machine.describe()
            targets, bursts = asyncio.run(
                _run(console, targets, load, numbers, rounds=rounds, warmup=warmup)
            )
    except (BenchError, ChildError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    console.print(report.tables(bursts, base, max_tokens))
    console.print(
        f"{rounds} rounds after {warmup} of warm-up, {max_tokens} tokens each, picture "
        f"{load.image.width} x {load.image.height}. {machine.summary(before)}",
        markup=False,
    )
    if json_path:
        settings = {
            "rounds": rounds,
            "warmup": warmup,
            "streams": numbers,
            "dtype": dtype,
            "checkpoints": {
                str(path): machine.checkpoint_digest(path)
                for path in (serve, transformers_serve)
                if path
            },
        }
        json_path.write_text(report.as_json(bursts, targets, load, base, before, settings))
    if any(record.error for burst in bursts for record in burst.records):
        raise typer.Exit(1)


async def _run(
    console: Console,
    targets: Sequence[Target],
    load: Load,
    streams: Sequence[int],
    *,
    rounds: int,
    warmup: int,
) -> tuple[list[Target], list[Burst]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(LONGEST_ANSWER_S, connect=10.0)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as client:
        picture, _ = load.prompt(-1, 0)
        ready = []
        for target in targets:
            try:
                ready.append(await resolved(client, target, picture))
            except httpx.HTTPError as error:
                raise BenchError(f"{target.name} at {target.url}: {error!r}") from error
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        ) as progress:
            task = progress.add_task("", total=(rounds + warmup) * len(streams) * len(targets))

            def step(description: str) -> None:
                progress.update(task, description=description, advance=1)

            bursts = await measure(
                client, ready, load, streams=streams, rounds=rounds, warmup=warmup, progress=step
            )
    return ready, bursts


def _configured(
    targets: Sequence[Target], models: dict[str, str], keys: dict[str, str]
) -> list[Target]:
    names = [target.name for target in targets]
    for name in [*models, *keys]:
        if name not in names:
            raise BenchError(f"{name} is none of the servers: {', '.join(names)}")
    if len(set(names)) < len(names):
        raise BenchError(f"two servers have the same name: {', '.join(names)}")
    return [
        replace(t, model=models.get(t.name, t.model), api_key=keys.get(t.name, t.api_key))
        for t in targets
    ]


def _variants(targets: Sequence[Target], wanted: dict[str, str]) -> list[Target]:
    """Each target once, or once for each of its steering settings."""
    if unknown := wanted.keys() - {target.name for target in targets}:
        raise BenchError(f"--steering names no server: {', '.join(sorted(unknown))}")
    result: list[Target] = []
    for target in targets:
        settings = wanted.get(target.name)
        if settings is None:
            result.append(target)
            continue
        for setting in settings.split(","):
            extra = {"steering": _override(setting)}
            result.append(replace(target, name=f"{target.name} {setting}", extra=extra))
    return result


def _override(setting: str) -> dict[str, Any]:
    if setting in ("off", "dataset"):
        return {"mode": setting}
    try:
        return {"mode": "dataset", "alpha": float(setting)}
    except ValueError:
        raise BenchError(f"steering {setting!r} is not off, dataset or an alpha") from None


def _pairs(values: Sequence[str] | None) -> list[tuple[str, str]]:
    pairs = [value.partition("=") for value in values or ()]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise typer.BadParameter(f"{name!r}: write NAME=VALUE")
    return [(name, value) for name, _, value in pairs]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"--streams {text!r}: write for example 1,4,16")
    return numbers


def _image(path: Path | None) -> Image.Image:
    source = path or resources.files("server.demo") / "photo.jpg"
    with source.open("rb") as file:
        return Image.open(file).convert("RGB")
