"""`deshift extract`: anchors + model -> a vector set in the store."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from server.cli.options import JsonOption, StoreOption, print_json, settings_with, with_store
from server.control import activate as point_alias
from steering.stores import Store, without_credentials
from steering.vectors import ShiftVectors

BY = "deshift extract"


def extract(
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id; by default DESHIFT_MODEL.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    anchors: Annotated[
        Path | None,
        typer.Option(
            help='JSON Lines of {"label": "harmful" | "harmless", "text"}; by default the set '
            "that ships."
        ),
    ] = None,
    unbalanced: Annotated[
        bool, typer.Option("--unbalanced", help="Take anchors whose labels differ in number.")
    ] = False,
    corruption: Annotated[
        Literal["blank", "noise", "gray"], typer.Option(help="The image without content.")
    ] = "blank",
    image_size: Annotated[
        str, typer.Option(help="Its size, WIDTHxHEIGHT.", metavar="WxH")
    ] = "336x336",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts run together.")] = 8,
    basis_rank: Annotated[
        int, typer.Option(min=0, help="Singular vectors kept of each layer; 0 for none.")
    ] = 0,
    store: StoreOption = None,
    alias: Annotated[
        str | None, typer.Option(help="Point this alias to the new vector set.")
    ] = None,
    activate: Annotated[
        bool, typer.Option("--activate", help="Point the alias that the server follows to it.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the file here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model's shift vectors and put them into the store."""
    size = _size(image_size)
    settings = settings_with(
        {"model": model, "revision": revision, "dtype": dtype, "device": device, "store": store}
    )
    if settings.model is None:
        raise typer.BadParameter("give a model: --model or DESHIFT_MODEL", param_hint="--model")
    from tqdm import tqdm

    from steering.anchors import load_anchors
    from steering.extract import extract as measure
    from steering.models import load_model

    anchor_set = load_anchors(anchors, balanced=not unbalanced)
    # Before the minutes that measuring takes: does the store answer?
    with_store(settings.store_url, lambda store: store.list_vectors())
    loaded = load_model(
        settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
    )
    with tqdm(total=len(anchor_set), desc="extract", unit="prompt") as bar:
        vectors = measure(
            loaded,
            anchor_set,
            corruption=corruption,
            image_size=size,
            batch_size=batch_size,
            basis_rank=basis_rank,
            on_progress=bar.update,
        )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        vectors.save(output)
    names = [name for name in (alias, settings.vector_alias if activate else None) if name]
    with_store(settings.store_url, lambda store: _keep(store, vectors, names))
    if as_json:
        print_json({"id": vectors.id, "aliases": names, "manifest": vectors.manifest.as_dict()})
        return
    typer.echo(f"vector set {vectors.id} is in {without_credentials(settings.store_url)}")
    for name in names:
        typer.echo(f"alias {name} points to it")


async def _keep(store: Store, vectors: ShiftVectors, aliases: list[str]) -> None:
    await store.put_vectors(vectors.to_bytes())
    for alias in aliases:
        await point_alias(store, alias, vectors.id, by=BY, reason="a new vector set was made")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) > 0 and int(height) > 0):
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT", param_hint="--image-size")
    return int(width), int(height)
