"""`deshift serve`: the environment's settings, overridden by options, handed to the server."""

import logging
from typing import Annotated

import typer

from server.cli.options import StoreOption, settings_with
from server.config import Settings

log = logging.getLogger("deshift")


def serve(
    model: Annotated[str | None, typer.Option(help="Directory or hub id of the model.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that requests use; by default the model's own.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt plus answer, in tokens.")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(help="Sequences that are decoded together.")
    ] = None,
    store: StoreOption = None,
    vector_alias: Annotated[str | None, typer.Option(help="Name of the vector set.")] = None,
    steering_mode: Annotated[str | None, typer.Option(help="off, dataset or sample.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Strength; 0 is an exact no-op.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="all, incremental, range:a-b, single:l or incremental:a-b."),
    ] = None,
    client_override: Annotated[
        str | None,
        typer.Option(help="What a request may change: none, strengthen or any."),
    ] = None,
    or_demo: Annotated[
        bool,
        typer.Option(
            "--or-demo", help="Without a model: build the demonstration model and serve it."
        ),
    ] = False,
) -> None:
    """Serve a model over the OpenAI API.

    Every option is also an environment variable, DESHIFT_<NAME>, and there are more of those (the
    README has the table). The API key is read from DESHIFT_API_KEY only: a command line is
    visible to other users of the machine.
    """
    options: dict[str, object] = {
        "model": model,
        "revision": revision,
        "served_model_name": served_model_name,
        "dtype": dtype,
        "device": device,
        "host": host,
        "port": port,
        "max_model_len": max_model_len,
        "max_rows": max_rows,
        "store": store,
        "vector_alias": vector_alias,
        "steering_mode": steering_mode,
        "alpha": alpha,
        "schedule": schedule,
        "client_override": client_override,
    }
    settings = settings_with(options)
    if or_demo and not settings.model:
        settings = settings_with({**options, **_demonstration(settings)})
    from server import serve as server

    server.serve(settings)


def _demonstration(settings: Settings) -> dict[str, object]:
    from server.demo import setup  # torch: seconds
    from server.logs import configure_logging

    configure_logging(settings.log_format)
    log.info(
        "no model is set: the demonstration model, in %s (half a minute the first time)",
        settings.cache,
    )
    return setup.prepare_for(settings)
