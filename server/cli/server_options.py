"""Options of commands that ask a server: which one or how one is started here, and the asking.

Each is a type of a parameter: `url: server_options.Url = None`.
"""

from pathlib import Path
from typing import Annotated

import typer

Url = Annotated[str | None, typer.Option(help="A running Deshift server.")]
Demo = Annotated[bool, typer.Option("--demo", help="Start a server on the demonstration model.")]
Serve = Annotated[
    Path | None,
    typer.Option(help="Start a server on a checkpoint.", exists=True, file_okay=False),
]
Setting = Annotated[
    list[str] | None,
    typer.Option(help="A setting of the started server.", metavar="NAME=VALUE"),
]
Dtype = Annotated[str, typer.Option(help="Number format of a started server.")]
Logs = Annotated[Path, typer.Option(help="Directory for a started server's log.")]
Model = Annotated[
    str | None, typer.Option(help="The model to ask for; by default the first listed.")
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(help="The environment variable that holds the API key.", metavar="NAME"),
]
Photos = Annotated[
    Path | None,
    typer.Option(
        help="Folder of photographs for prompts without a picture; by default rendered ones.",
        metavar="DIR",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of sample, pictures and server.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of each answer.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests under way at once.")]
Out = Annotated[Path, typer.Option(help="The run's folder; made here.", metavar="RUN_DIR")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in RUN_DIR.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write every figure here.")]
