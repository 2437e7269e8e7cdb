"""`deshift kill`: by the store, and on single replicas when there is no store."""

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from server.admin.app import create_admin_app
from server.app import build_services
from server.services import Services
from steering.stores.memory import MemoryStore
from tests.server.cli.conftest import Deshift
from tests.server.conftest import make_settings
from tests.server.fakes import FakeEngine

WHY = ("--reason", "for the test")
KEY = "ops-key-0123456789abcdef"


@dataclass
class Replica:
    """An admin listener that notes what it is asked. answer: status and body."""

    url: str
    asked: list[tuple[str, str, str, Any]] = field(default_factory=list)
    answer: tuple[int, Any] = (200, {"fleet": None, "replica": "reject"})


@pytest.fixture
def replica() -> Iterator[Replica]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_PUT(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            found.asked.append(("PUT", self.path, self.headers["authorization"], body))
            status, answer = found.answer
            self.send_response(status)
            self.send_header("location", f"{found.url}/elsewhere")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Replica(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield found
        server.shutdown()


@pytest.fixture
def listener(fake_engine: FakeEngine) -> Iterator[tuple[str, Services]]:
    """The admin listener itself, on a port."""
    store = MemoryStore()
    settings = make_settings(admin_keys=f"ann:{KEY}")
    services = build_services(settings, fake_engine, store, store)
    server = uvicorn.Server(
        uvicorn.Config(create_admin_app(services), log_config=None, lifespan="off")
    )
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", services
        server.should_exit = True
        thread.join()
    services.pool.shutdown()


@pytest.fixture
def admin_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESHIFT_ADMIN_KEY", KEY)


@pytest.fixture
def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_the_switch_is_shown_set_and_taken_back(deshift: Deshift) -> None:
    shown = deshift("kill")
    assert shown.stdout.startswith("kill switch: none, revision 0\n")
    for action, before, revision in (("unsteered", "none", 1), ("none", "unsteered", 2)):
        result = deshift("kill", action, *WHY)
        assert result.exit_code == 0, result.stderr
        assert f"kill switch: {action} (was {before}), revision {revision}" in result.stdout
        told = json.loads(deshift("kill", "--json").stdout)
        assert told == {"kill": action, "revision": revision}
    assert "every tenant's own policy is in force" in deshift("kill").stdout


def test_what_is_so_already_makes_no_revision(deshift: Deshift) -> None:
    assert deshift("kill", "reject", *WHY).exit_code == 0
    again = deshift("kill", "reject", *WHY)
    assert "reject (was so already), revision 1" in again.stdout
    told = json.loads(deshift("kill", "reject", *WHY, "--json").stdout)
    assert told == {"before": "reject", "kill": "reject", "revision": 1}


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("on", *WHY), 2, "'none'"),
        (("unsteered",), 2, "--reason"),
        (WHY, 2, "say which"),
        (("--replica", "http://x:8001"), 2, "say which"),
        (("unsteered", "--reason", " "), 1, "needs a reason"),
        (("unsteered", "--revision", "3", *WHY), 1, "the kill switch is at revision 0, not 3"),
    ],
)
def test_what_is_not_clear_changes_nothing(
    deshift: Deshift, arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    result = deshift("kill", *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert said in result.stderr
    assert json.loads(deshift("kill", "--json").stdout)["kill"] == "none"


def test_without_the_store_the_error_says_what_still_works(
    deshift: Deshift, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = deshift("kill", "reject", *WHY, "--store", f"sqlite:///{tmp_path}/file/x.db")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "--replica http://HOST:8001" in result.stderr


@pytest.mark.usefixtures("admin_key")
def test_a_replica_is_asked_with_the_key_and_the_store_is_not(
    deshift: Deshift, replica: Replica, tmp_path: Path
) -> None:
    result = deshift(
        *("kill", "reject", "--reason", " Redis is gone ", "--replica", f"{replica.url}/"),
        *("--admin-key-from-env", "--store", f"sqlite:///{tmp_path}/none.db"),
    )
    assert result.exit_code == 0, result.stderr
    assert replica.asked == [
        (
            *("PUT", "/admin/v1/kill", f"Bearer {KEY}"),
            {"action": "reject", "reason": "Redis is gone", "scope": "replica"},
        )
    ]
    assert f"{replica.url}: kill switch reject, on this replica" in result.stdout
    assert not (tmp_path / "none.db").exists()


@pytest.mark.usefixtures("admin_key")
def test_the_admin_listener_understands_what_it_is_asked(
    deshift: Deshift, listener: tuple[str, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, services = listener
    command = (*WHY, "--replica", url, "--admin-key-from-env")
    for action in ("reject", "none", "unsteered"):
        result = deshift("kill", action, *command)
        assert result.exit_code == 0, result.output
        assert services.directory.local_kill == action
    monkeypatch.setenv("DESHIFT_ADMIN_KEY", "another-key-0123456789")
    refused = deshift("kill", "none", *command)
    assert refused.exit_code == 1 and "NOT DONE: answered 401: " in refused.stdout
    assert services.directory.local_kill == "unsteered"


@pytest.mark.usefixtures("admin_key")
def test_each_replica_is_reported_and_one_that_fails_does_not_stop_the_others(
    deshift: Deshift, replica: Replica, nobody: str
) -> None:
    urls = ("--replica", nobody, "--replica", replica.url)
    result = deshift("kill", "unsteered", *WHY, *urls, "--admin-key-from-env")
    assert result.exit_code == 1 and len(replica.asked) == 1
    first, second, *_ = result.stdout.splitlines()
    assert first.startswith(f"{nobody}: NOT DONE: cannot be reached")
    assert second == f"{replica.url}: kill switch unsteered, on this replica"
    told = json.loads(deshift("kill", "none", *WHY, *urls, "--admin-key-from-env", "--json").stdout)
    assert [(each["replica"], each["kill"], each["done"]) for each in told] == [
        (nobody, "none", False),
        (replica.url, "none", True),
    ]


@pytest.mark.usefixtures("admin_key")
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, {"error": {"message": "wrong key"}}), "answered 401: wrong key"),
        ((500, "boom"), "answered 500: Internal Server Error"),
        ((307, {}), "answered 307: Temporary Redirect"),
    ],
)
def test_a_replica_that_refuses_is_quoted_and_the_key_never_shown(
    deshift: Deshift, replica: Replica, answer: tuple[int, Any], said: str
) -> None:
    replica.answer = answer
    result = deshift("kill", "reject", *WHY, "--replica", replica.url, "--admin-key-from-env")
    assert result.exit_code == 1 and len(replica.asked) == 1
    assert f"NOT DONE: {said}" in result.stdout
    assert KEY not in result.output


@pytest.mark.parametrize(
    ("key", "options", "said"),
    [
        (None, (), "give --admin-key-from-env and set DESHIFT_ADMIN_KEY"),
        (None, ("--admin-key-from-env",), "DESHIFT_ADMIN_KEY must be printable"),
        ("two words", ("--admin-key-from-env",), "DESHIFT_ADMIN_KEY must be printable"),
        ("schlüssel", ("--admin-key-from-env",), "DESHIFT_ADMIN_KEY must be printable"),
    ],
)
def test_a_key_that_cannot_be_one_is_not_sent_nor_shown(
    deshift: Deshift,
    replica: Replica,
    monkeypatch: pytest.MonkeyPatch,
    key: str | None,
    options: tuple[str, ...],
    said: str,
) -> None:
    if key is not None:
        monkeypatch.setenv("DESHIFT_ADMIN_KEY", key)
    result = deshift("kill", "reject", *WHY, "--replica", replica.url, *options)
    assert (result.exit_code, replica.asked) == (1, [])
    assert said in result.stderr
    assert key is None or key not in result.stderr


@pytest.mark.usefixtures("admin_key")
@pytest.mark.parametrize(
    "url",
    ["10.0.0.7:8001", "ftp://x", "http://", "http://u:pass@x", "http://x/admin", "http://x?a"],
)
def test_what_is_no_address_of_a_listener_is_refused(deshift: Deshift, url: str) -> None:
    result = deshift("kill", "reject", *WHY, "--replica", url, "--admin-key-from-env")
    assert result.exit_code == 1 and "such as http://10.0.0.7:8001" in result.stderr
    assert "pass" not in result.output


@pytest.mark.usefixtures("admin_key")
def test_the_operators_key_is_no_setting_of_the_server(deshift: Deshift) -> None:
    """It stood in the way of every other command of the same shell."""
    assert deshift("tenants", "list").exit_code == 0
