"""`python -m server.cli`, the same as `deshift`."""

from server.cli.main import run

run()
