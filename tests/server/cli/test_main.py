"""The root of the command."""

import subprocess
import sys

from tests.server.cli.conftest import Deshift


def test_help_names_every_group(deshift: Deshift) -> None:
    result = deshift("--help")
    assert result.exit_code == 0
    for name in (
        *("serve", "extract", "vectors", "tenants", "keys", "policy", "audit", "kill", "replicas"),
        *("bench", "demo", "eval", "calibrate"),
    ):
        assert f" {name} " in result.stdout
    assert deshift("vectors", "nothing").exit_code == 2


def test_reading_vectors_does_not_import_transformers() -> None:
    """It takes seconds; a subcommand imports what is heavy when it runs."""
    code = "import sys, server.cli.main; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
