"""`deshift vectors`: what is in the store, where it comes from, and which set is served."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from server.cli.control import AdminStoreOption
from server.cli.options import (
    JsonOption,
    StoreOption,
    console,
    operator_name,
    print_json,
    settings_with,
    with_store,
)
from server.control import activate as point_alias
from steering.stores import Store, VectorRecord, without_credentials
from steering.stores.base import aliases as aliases_of
from steering.stores.base import resolve
from steering.vectors import ShiftVectors

vectors = typer.Typer(no_args_is_help=True, help="Vector sets in the store, and their aliases.")

SetArgument = Annotated[
    str, typer.Argument(help="An alias, an id, or the first 8 or more digits of an id.")
]
ReasonOption = Annotated[str, typer.Option(help="Why, for the audit.")]
_REASON = "activated by command line"


@vectors.command("list")
def list_sets(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List every vector set, oldest first, with the aliases that point to it."""

    async def read(opened: Store) -> tuple[list[VectorRecord], dict[str, str]]:
        return await opened.list_vectors(), await aliases_of(opened)

    records, aliases = with_store(settings_with({"store": store}).store_url, read)
    named = {
        record.id: sorted(name for name, id_ in aliases.items() if id_ == record.id)
        for record in records
    }
    if as_json:
        print_json(
            [
                {
                    "id": record.id,
                    "aliases": named[record.id],
                    "size_bytes": record.size_bytes,
                    "manifest": record.manifest.as_dict(),
                }
                for record in records
            ]
        )
        return
    table = Table("id", "alias", "model", "corruption", "anchors", "layers x D", "size", "created")
    for record in records:
        table.add_row(*_list_row(record, named[record.id]))
    table.columns[0].no_wrap = True
    console().print(table if records else "no vector sets yet: deshift extract makes one")


@vectors.command()
def show(name: SetArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show where a vector set comes from and how large the shift is at each layer."""

    async def read(opened: Store) -> tuple[ShiftVectors, dict[str, str]]:
        found = await opened.get_vectors(await resolve(opened, name))
        return found, await aliases_of(opened)

    vector_set, known = with_store(settings_with({"store": store}).store_url, read)
    vector_id = vector_set.id
    aliases = sorted(alias for alias, id_ in known.items() if id_ == vector_id)
    layers = _layers(vector_set)
    if as_json:
        manifest = vector_set.manifest.as_dict()
        print_json({"id": vector_id, "aliases": aliases, "manifest": manifest, "layers": layers})
        return
    printer = console()
    printer.print(_provenance(vector_set, aliases, len(vector_set.to_bytes())))
    table = Table("layer", "|Delta|", "|h|", "|Delta| / |h|", "consistency")
    for column in table.columns:
        column.justify = "right"
    for layer in layers:
        table.add_row(
            str(layer["layer"]),
            f"{layer['delta_norm']:.3f}",
            f"{layer['hidden_norm']:.3f}",
            f"{layer['relative_shift']:.4f}",
            f"{layer['consistency']:.3f}",
        )
    printer.print(table)


@vectors.command()
def activate(
    name: SetArgument,
    alias: Annotated[
        str | None,
        typer.Option(help="The alias; by default the one that the server follows."),
    ] = None,
    reason: ReasonOption = _REASON,
    store: AdminStoreOption = None,
) -> None:
    """Point an alias to a vector set; running servers follow without a restart."""
    settings = settings_with({"admin_store": store})
    alias = alias or settings.vector_alias

    async def move(opened: Store) -> tuple[str, str | None]:
        before = (await aliases_of(opened)).get(alias)
        vector_id = await resolve(opened, name)
        await point_alias(opened, alias, vector_id, by=operator_name(), reason=reason)
        return vector_id, before

    vector_id, before = with_store(settings.admin_store or settings.store_url, move)
    was = f", was {before}" if before not in (None, vector_id) else ""
    typer.echo(f"alias {alias} points to {vector_id}{was}")


@vectors.command()
def add(
    file: Annotated[Path, typer.Argument(help="A vector set's file.")],
    alias: Annotated[str | None, typer.Option(help="Point this alias to it.")] = None,
    reason: ReasonOption = _REASON,
    store: AdminStoreOption = None,
) -> None:
    """Put a vector set's file into the store."""
    vector_set = ShiftVectors.load(file)
    settings = settings_with({"admin_store": store})
    vector_id = _put(settings.admin_store or settings.store_url, vector_set, alias, reason)
    typer.echo(vector_id if alias is None else f"{vector_id}\nalias {alias} points to it")


@vectors.command()
def push(
    name: SetArgument,
    to: Annotated[str, typer.Option("--to", help="The other store.", metavar="URL")],
    alias: Annotated[
        str | None, typer.Option(help="Point this alias of the other store to it.")
    ] = None,
    reason: ReasonOption = _REASON,
    store: StoreOption = None,
) -> None:
    """Copy a vector set to another store; its bytes are verified on both sides."""

    async def read(opened: Store) -> ShiftVectors:
        return await opened.get_vectors(await resolve(opened, name))

    vector_set = with_store(settings_with({"store": store}).store_url, read)
    vector_id = _put(to, vector_set, alias, reason)
    typer.echo(f"vector set {vector_id} is in {without_credentials(to)}")
    if alias is not None:
        typer.echo(f"alias {alias} points to it")


def _put(url: str, vector_set: ShiftVectors, alias: str | None, reason: str) -> str:
    """Keep a set, read it back, point an alias to it; returns its id."""

    async def put(opened: Store) -> str:
        vector_id = await opened.put_vectors(vector_set.to_bytes())
        await opened.get_vectors(vector_id)
        if alias is not None:
            await point_alias(opened, alias, vector_id, by=operator_name(), reason=reason)
        return vector_id

    return with_store(url, put)


def _list_row(record: VectorRecord, aliases: list[str]) -> tuple[str, ...]:
    manifest = record.manifest
    return (
        record.id[:12],
        ", ".join(aliases),
        manifest.model.model_id,
        manifest.corruption,
        f"{manifest.anchor_set} ({manifest.num_anchors})",
        f"{manifest.model.num_layers} x {manifest.model.hidden_size}",
        f"{record.size_bytes / 1024:.0f} KiB",
        record.created_at,
    )


def _layers(vector_set: ShiftVectors) -> list[dict[str, Any]]:
    delta_norm = vector_set.mean.norm(dim=-1)
    columns = {
        "layer": list(range(vector_set.num_layers)),
        "delta_norm": delta_norm.tolist(),
        "hidden_norm": vector_set.hidden_norm.tolist(),
        "relative_shift": (delta_norm / vector_set.hidden_norm).tolist(),
        "consistency": vector_set.consistency.tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _provenance(vector_set: ShiftVectors, aliases: list[str], size_bytes: int) -> Table:
    manifest = vector_set.manifest
    model = manifest.model
    optional = ("basis", "refusal_direction", "text_mean")
    extras = [name for name in optional if getattr(vector_set, name) is not None]
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in {
        "id": vector_set.id,
        "aliases": ", ".join(aliases) or "none",
        "model": model.model_id,
        "revision": model.revision or "none",
        "weights": model.weights_digest,
        "dtype": model.dtype + (f", {model.quantisation}" if model.quantisation else ""),
        "processor": model.processor_digest,
        "chat template": model.chat_template_digest,
        "corruption": f"{manifest.corruption}, {manifest.image_size}",
        "anchors": f"{manifest.anchor_set}, {manifest.num_anchors}, {manifest.anchor_set_digest}",
        "layers": f"{model.num_layers} x {model.hidden_size}, {manifest.layer_convention}",
        "besides the mean": ", ".join(extras) or "nothing",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.versions),
        "created": manifest.created_at,
        "size": f"{size_bytes} bytes",
    }.items():
        table.add_row(f"{label}:", value)
    return table
