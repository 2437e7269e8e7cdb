"""`deshift bench`: our server's conditions and any other OpenAI-compatible servers, interleaved."""

import secrets
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from server.bench import report
from server.bench.effort import Effort
from server.bench.footprint import DTYPES
from server.bench.prompts import NUM_CODES, Prompts
from server.bench.run import run
from server.bench.scenarios import SCENARIOS
from server.bench.servers import Wanted
from server.bench.target import BenchError
from server.cli import server_options
from server.cli.options import console, pairs
from server.process import ChildError

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
    json_path: server_options.JsonPath = None,
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
    if scenario not in SCENARIOS:
        raise typer.BadParameter(f"--scenario {scenario!r} is not one of: {', '.join(SCENARIOS)}")
    effort = Effort(
        streams=_numbers(streams or ("8" if SCENARIOS[scenario].fleet else "1,4,16,32")),
        rounds=rounds,
        max_tokens=max_tokens,
        warmup=warmup,
        pause_s=pause,
        arrivals=arrivals,
        num_requests=requests,
        num_changes=changes,
    )
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r} is not one of: {', '.join(DTYPES)}")
    wanted = Wanted(
        serve=serve,
        demo=demo,
        shape=shape,
        dtype=dtype,
        logs=logs,
        settings=pairs(setting, "--setting"),
        plain_sample=plain_sample,
        transformers_serve=transformers_serve,
        generate=generate,
        urls=pairs(url, "--url"),
        steering=dict(pairs(steering, "--steering")),
        models=dict(pairs(model, "--model")),
        api_keys=dict(pairs(api_key, "--api-key")),
    )
    prompts = Prompts(_image(image), secrets.randbelow(NUM_CODES) if seed is None else seed)
    _run(scenario, wanted, effort, prompts, baseline, json_path)


def _run(
    scenario: str,
    wanted: Wanted,
    effort: Effort,
    prompts: Prompts,
    baseline: str | None,
    json_path: Path | None,
) -> None:
    """Print and write what is found. Ends with 1 where that is nothing, or where a chat failed."""
    screen = console(WIDTH)
    screen.print(f"Preparing models and servers (their logs: {wanted.logs})")
    try:
        done = run(scenario, wanted, effort, prompts, screen, baseline=baseline)
    except (BenchError, ChildError) as error:
        screen.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    report.show(done, screen)
    if json_path:
        json_path.write_text(report.as_json(done))
    if done.outcome.num_failed:
        raise typer.Exit(1)


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
