"""`deshift bench`: our server's conditions and any other OpenAI-compatible servers, interleaved."""

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Annotated

import httpx
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from server.bench import fleet, machine, report, scenarios, servers
from server.bench.footprint import DTYPES, Footprint
from server.bench.load import Column, Served
from server.bench.prompts import NUM_CODES, Prompts
from server.bench.scenarios import FLEETS, SCENARIOS, Effort, Outcome, Scenario
from server.bench.servers import Checkpoint, Started
from server.bench.target import BenchError, Target, resolved, variants
from server.process import ChildError

LONGEST_ANSWER_S = 600.0
WIDTH = 160  # where no terminal says its own


def bench(
    serve: Annotated[
        Path | None,
        typer.Option(
            help="Start this server, with the settings of the environment, on a checkpoint.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Start it on the demonstration model.")
    ] = False,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Start it on a model of a known shape with random weights, built once in the "
            "cache directory: llava-0.5b or llava-1.5-7b."
        ),
    ] = None,
    steering: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure a Deshift server (the started one is `deshift`) in several conditions: "
            "off, dataset, sample-cold, sample-warm or an alpha each; one that is named twice "
            "shows what the machine's noise is. --demo and --shape: the first four, unless given.",
            metavar="NAME=CONDITION,...",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting of the started Deshift servers: decoder=eager, max_model_len=1024.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    plain_sample: Annotated[
        bool,
        typer.Option(
            "--plain-sample",
            help="Also start it without caches at the sample level: two whole extra passes.",
        ),
    ] = False,
    transformers_serve: Annotated[
        bool,
        typer.Option(
            "--transformers-serve", help="Also start `transformers serve` on that checkpoint."
        ),
    ] = False,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate",
            help="Also run transformers' generate here on that checkpoint, a burst as one batch.",
        ),
    ] = False,
    url: Annotated[
        list[str] | None,
        typer.Option(help="Another server: name=http://host:port.", metavar="NAME=URL"),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A server's model; by default the first it lists.", metavar="NAME=MODEL"),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A server's API key.", metavar="NAME=KEY"),
    ] = None,
    scenario: Annotated[str, typer.Option(help=f"One of: {', '.join(SCENARIOS)}.")] = "throughput",
    streams: Annotated[
        str | None,
        typer.Option(
            help="Numbers of chats at once; by default 1,4,16,32, and 8 where --scenario is "
            "toggle or scrapes."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before them, not counted.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="Requests of --scenario memory.")] = 2000,
    changes: Annotated[
        int, typer.Option(min=1, help="Changes of alpha in --scenario toggle.")
    ] = 200,
    arrivals: Annotated[
        int, typer.Option(min=1, help="Long prompts under way at once in --scenario stalls.")
    ] = 1,
    pause: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Seconds of rest before each burst of another server than the last (not between "
            "conditions of one): threads of some servers go on spinning after the last answer and "
            "would slow whoever comes next.",
            metavar="SECONDS",
        ),
    ] = 1.0,
    image: Annotated[
        Path | None, typer.Option(help="A picture; by default the photograph that ships.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Where pictures and texts begin to be numbered; by default drawn anew, so that "
            "a server that runs on has seen none of them."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Number format of started servers.")] = "bfloat16",
    baseline: Annotated[
        str | None, typer.Option(help="Column that ratios refer to; by default the first.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write every figure here.")
    ] = None,
    logs: Annotated[Path, typer.Option(help="Directory for the logs of started servers.")] = Path(
        ".deshift/bench"
    ),
) -> None:
    """Measure servers side by side: every column in turn, round by round, in one run.

    Every chat has a photograph and a text that no other chat has, so that no cache answers for
    the work. sample-warm: photographs of one size, so the corrupted picture is known; sample-cold:
    every photograph of a new size. (Models that scale a picture to a fixed size spend equally
    many tokens on both; for others cold is a few pixels more.) Ratios are taken within rounds;
    for differences of 1 % use many short rounds (--rounds 40 --max-tokens 16). Servers that know
    `ignore_eos` (or, as `transformers serve`, a generation config) produce exactly --max-tokens.

    --scenario throughput: tokens/s, time to first token, gaps between tokens, a decode step with
    all chats decoding (none is shown where the first chat ended before the last began: raise
    --max-tokens), what steering costs by the server's account and by comparison.

    --scenario stalls: the gaps between tokens of running answers while text prompts of 2,000
    tokens keep arriving, --arrivals at once, each when one before it is answered, and without
    them; --max-tokens 256 or more. Started servers have rows for both (fewer with --setting
    max_rows=N: then arrivals wait).

    --scenario second-turn: time to first token of a second question about a picture, after an
    answer of --max-tokens, over that of the first.

    --scenario memory: the server's memory over --requests unlike requests with random cancels,
    as many at once as the largest of --streams, against weights, KV budget and cache budgets.

    --scenario toggle: starts a Redis (redis-server in PATH) and two replicas on --serve, --demo or
    --shape, with a tenant whose alpha is changed --changes times, by the admin API, the command and
    the console's form in turn, while as many chats as the largest of --streams are under way. How
    soon each change is in force on both replicas, what became of the chats, and what 1,000 tenants
    cost.

    --scenario scrapes: starts a Redis and a replica with 200 tenants that all had traffic. What a
    scrape of /metrics takes, and the gaps between tokens of as many running answers as the largest
    of --streams, with a scrape each second and without.

    --scenario metrics: what /metrics exports as steering's overhead, read around each burst, beside
    what the chats took longer than the baseline's of the same round.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    chosen = _scenario(scenario)
    numbers = _numbers(streams or ("8" if chosen in FLEETS else "1,4,16,32"))
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r} is not one of: {', '.join(DTYPES)}")
    prompts = Prompts(_image(image), secrets.randbelow(NUM_CODES) if seed is None else seed)
    try:
        with contextlib.ExitStack() as started:
            console.print(f"Preparing models and servers (their logs: {logs})")
            checkpoint = servers.checkpoint(serve, demo, shape)
            replicas = None
            if chosen in FLEETS:
                if plain_sample or transformers_serve or generate or url or steering:
                    raise BenchError(f"--scenario {chosen} measures replicas and nothing else")
                num_replicas, num_tenants = FLEETS[chosen]
                replicas = fleet.start(
                    started,
                    checkpoint,
                    num_replicas=num_replicas,
                    num_tenants=num_tenants,
                    settings=_pairs(setting),
                    num_rows=max(numbers),
                    logs=logs,
                    dtype=dtype,
                )
                found = Started(list(replicas.targets), {})
            else:
                found = servers.start(
                    started,
                    checkpoint,
                    plain_sample=plain_sample,
                    transformers=transformers_serve,
                    settings=_pairs(setting),
                    num_rows=max(numbers) + (arrivals if chosen == "stalls" else 0),
                    logs=logs,
                    dtype=dtype,
                )
            named = [Target(name, at.rstrip("/").removesuffix("/v1")) for name, at in _pairs(url)]
            targets = [*found.targets, *named]
            targets = _configured(targets, dict(_pairs(model)), dict(_pairs(api_key)))
            conditions = dict(_pairs(steering))
            if checkpoint and checkpoint.conditions and replicas is None:
                conditions.setdefault(servers.OURS, checkpoint.conditions)
            targets = variants(targets, conditions)
            local = _generate(checkpoint, dtype) if generate else []
            names = [target.name for target in targets] + [column.name for column in local]
            if not names:
                raise BenchError("nothing to measure: give --serve, --demo, --shape or --url")
            base = baseline or names[0]
            if base not in names:
                raise BenchError(f"--baseline {base} is none of: {', '.join(names)}")
            effort = Effort(
                numbers,
                rounds,
                warmup,
                max_tokens,
                requests,
                base,
                arrivals=arrivals,
                pause_s=pause,
                budgets=found.budgets,
                fleet=replicas,
                num_changes=changes,
            )
            before = machine.describe()
            targets, outcome = asyncio.run(_run(console, chosen, targets, local, prompts, effort))
            before["load_average_after"] = list(os.getloadavg())
            footprints = {
                target.name: footprint
                for target in found.targets
                if (footprint := Footprint.of(target.pid))
            }
    except (BenchError, ChildError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    for table in outcome.tables:
        console.print(table)
    if footprints and chosen != "memory":
        console.print(report.footprint_table(footprints))
    how = f"{rounds} rounds after {warmup} of warm-up, {max_tokens} tokens each, "
    rest = f"{pause:g} s of rest before each change of server, "
    if chosen == "toggle":
        how, rest = f"{max_tokens} tokens each, ", ""
    size = f"picture {prompts.image.width} x {prompts.image.height}. "
    console.print(
        ("" if chosen == "memory" else how) + rest + size + machine.summary(before), markup=False
    )
    if json_path:
        settings = {
            "scenario": chosen,
            "rounds": rounds,
            "warmup": warmup,
            "streams": numbers,
            "max_tokens": max_tokens,
            "requests": requests,
            "changes": changes,
            "arrivals": arrivals,
            "pause_s": pause,
            "seed": prompts.first,
            "dtype": dtype,
            "baseline": base,
            "server": dict(_pairs(setting)),
            "load_digest": prompts.digest,
            "image_size": prompts.image.size,
            "checkpoint": machine.checkpoint_digest(checkpoint.model) if checkpoint else None,
        }
        figures = outcome.figures | {
            "footprints": {name: asdict(each) for name, each in footprints.items()}
        }
        json_path.write_text(report.as_json(figures, targets, before, settings))
    if outcome.num_failed:
        raise typer.Exit(1)


def _generate(checkpoint: Checkpoint | None, dtype: str) -> list[Column]:
    from server.bench.generate import Generated  # torch: seconds

    if checkpoint is None:
        raise BenchError("--generate needs a checkpoint: give --serve, --demo or --shape")
    return [Generated(checkpoint.model, dtype)]


async def _run(
    console: Console,
    scenario: Scenario,
    targets: Sequence[Target],
    local: Sequence[Column],
    prompts: Prompts,
    effort: Effort,
) -> tuple[list[Target], Outcome]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(LONGEST_ANSWER_S, connect=10.0)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as client:
        ready = [
            await resolved(client, target, prompts.about_picture(NUM_CODES - 1 - index))
            for index, target in enumerate(targets)
        ]
        columns: list[Column] = [*(Served(client, target) for target in ready), *local]
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        ) as progress:
            task = progress.add_task("", total=scenarios.num_steps(scenario, columns, effort))

            def step(description: str) -> None:
                progress.update(task, description=description, advance=1)

            return ready, await scenarios.run(scenario, columns, prompts, effort, step)


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


def _scenario(text: str) -> Scenario:
    for scenario in SCENARIOS:
        if scenario == text:
            return scenario
    raise typer.BadParameter(f"--scenario {text!r} is not one of: {', '.join(SCENARIOS)}")


def _image(path: Path | None) -> Image.Image:
    source = path or resources.files("server.demo") / "photo.jpg"
    with source.open("rb") as file:
        return Image.open(file).convert("RGB")
