"""A real redis-server on a free port of 127.0.0.1, as deploy/redis sets it up.

It can be killed, paused and started again with or without its data, as chaos tests need it. Its
users are those of deploy/redis/users.acl, with passwords, and one more for the tests themselves.
"""

import hashlib
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

DEPLOY = Path(__file__).parents[1] / "deploy" / "redis"
PASSWORDS = {
    "deshift-server": "server-password-9f2c",
    "deshift-operator": "operator-password-71ab",
    "test-admin": "admin-password-c03d",
}
_START_S = 10.0


def program(name: str) -> str:
    """Where a program is; the test is skipped where it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def users() -> str:
    """deploy/redis/users.acl with the tests' passwords, and the tests' own administrator."""

    def digest(user: str) -> str:
        return hashlib.sha256(PASSWORDS[user].encode()).hexdigest()

    text = (DEPLOY / "users.acl").read_text()
    for user in ("server", "operator"):
        text = text.replace(f"SHA256_OF_THE_{user.upper()}_PASSWORD", digest(f"deshift-{user}"))
    return f"{text}user test-admin on #{digest('test-admin')} ~* &* +@all\n"


@dataclass(frozen=True)
class Certificate:
    """Files of a self-signed certificate for 127.0.0.1, which is its own authority."""

    certificate: Path
    key: Path


def make_certificate(directory: Path) -> Certificate:
    made = Certificate(directory / "redis.crt", directory / "redis.key")
    subprocess.run(
        [
            *(program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", made.key, "-out", made.certificate),
        ],
        check=True,
        capture_output=True,
    )
    return made


class RedisServer:
    """One server process at a time, always on the same port and directory; `start` it first.

    directory: its data, kept over `kill` and `stop`. acl: what its ACL file says. options: more
    lines of configuration, e.g. {"replicaof": "127.0.0.1 6380"}; they win over redis.conf.
    """

    def __init__(
        self,
        directory: Path,
        *,
        acl: str | None = None,
        tls: Certificate | None = None,
        options: dict[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.port = free_port()
        self.tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "users.acl").write_text(users() if acl is None else acl)
        # A copy: Sentinel has Redis rewrite its configuration.
        (directory / "redis.conf").write_bytes((DEPLOY / "redis.conf").read_bytes())
        ports = {"port": str(self.port)}
        if tls is not None:
            ports = {
                "port": "0",
                "tls-port": str(self.port),
                "tls-cert-file": str(tls.certificate),
                "tls-key-file": str(tls.key),
                "tls-ca-cert-file": str(tls.certificate),
                "tls-auth-clients": "no",
            }
        self._settings = {
            "bind": "127.0.0.1",
            **ports,
            "dir": str(directory),
            "aclfile": str(directory / "users.acl"),
            **(options or {}),
        }

    @property
    def log(self) -> Path:
        return self.directory / "redis.log"

    def url(self, user: str | None = "deshift-operator", query: str = "") -> str:
        """For `open_store`; user None: without credentials. TLS: the certificate is added."""
        credentials = f"{user}:{PASSWORDS[user]}@" if user else ""
        if self.tls is not None:
            query = "&".join(
                part for part in (f"ssl_ca_certs={self.tls.certificate}", query) if part
            )
        scheme = "rediss" if self.tls is not None else "redis"
        return f"{scheme}://{credentials}127.0.0.1:{self.port}/0{'?' if query else ''}{query}"

    def admin(self) -> "redis.Redis":
        """A client that may do everything; close it."""
        return redis.Redis.from_url(self.url("test-admin"))

    def start(self) -> None:
        """Returns when the server answers and has loaded its data."""
        command = [program("redis-server"), str(self.directory / "redis.conf")]
        for name, value in self._settings.items():
            command += [f"--{name}", *value.split(" ")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"redis-server did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """An orderly end; nothing happens when it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9, also of a paused one."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Like a partition: connections stay open and nothing is answered, until `resume`."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def restart(self, *, empty: bool = False) -> None:
        """After kill -9; with its data, or without them."""
        self.kill()
        if empty:
            shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)
        self.start()

    def flush(self) -> None:
        """Take all data away, under the connections of everybody."""
        client = self.admin()
        client.flushall()
        client.close()

    def _answers(self) -> bool:
        """Any answer will do, but that it still loads its data."""
        client = redis.Redis.from_url(self.url(None), socket_timeout=1.0)
        try:
            return bool(client.ping())
        except (redis.BusyLoadingError, redis.TimeoutError):
            return False
        except redis.AuthenticationError:  # it listens, and knows its users
            return True
        except redis.ConnectionError:
            return False
        finally:
            client.close()

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        self._process.wait(timeout=10)
        self._process = None

    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "start it first"
        return self._process
