"""Running the server as a process: its two listeners, uvicorn, signals.

Does not cover what is served (app.py, admin/app.py).
"""

import asyncio
import errno
import gc
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import httpx
import uvicorn
from fastapi import FastAPI

from server.admin.app import create_admin_app
from server.app import create_app, drain
from server.config import PREFIX, Settings
from server.errors import StartupError
from server.logs import configure_logging
from server.services import Services

log = logging.getLogger("deshift")
LAST_BYTES_S = 5  # after the engine has stopped, for the ends of answers to leave


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises ServerError, EngineError or SteeringError when it cannot start; the command words it.
    """
    configure_logging(settings.log_format)
    # First: a taken port costs no loaded model.
    with listening_socket(settings) as sock, admin_socket(settings) as for_operators:
        asyncio.run(run(create_app(settings), sock, for_operators))


def listening_socket(settings: Settings) -> socket.socket:
    """For clients: bound, and not yet listening, so that until the server is up connections are
    refused. Raises StartupError naming host and port.
    """
    return _bound_socket(settings.host, settings.port, "--port")


def admin_socket(settings: Settings) -> socket.socket:
    """For operators, likewise."""
    return _bound_socket(settings.admin_host, settings.admin_port, f"{PREFIX}ADMIN_PORT")


def _bound_socket(host: str, port: int, option: str) -> socket.socket:
    place = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"cannot listen on {place}: {error.strerror or error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        hint = f"; choose another with {option}" if error.errno == errno.EADDRINUSE else ""
        raise StartupError(f"cannot listen on {place}: {error.strerror}{hint}") from None
    return sock


async def run(app: FastAPI, sock: socket.socket, admin_sock: socket.socket) -> None:
    """Run the lifespan around both listeners, so that what it raises comes out here.

    The operators' listener answers until the clients' one has drained; when either ends, the other
    does.
    """
    services: Services = app.state.services
    async with app.router.lifespan_context(app):
        admin_app = create_admin_app(services)
        await _warm_up(app, admin_app)
        admin = AdminServer(admin_app)
        public = DrainingServer(app, services, admin)
        with public.capture_signals():  # until both have ended
            tasks = [
                asyncio.create_task(public.serve(sockets=[sock])),
                asyncio.create_task(admin.serve(sockets=[admin_sock])),
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                public.should_exit = admin.should_exit = True
                await asyncio.gather(*tasks)
                gc.unfreeze()


async def _warm_up(*apps: FastAPI) -> None:
    """What would hold up somebody's answer is done before anybody listens.

    An application builds its routes at its first request (40 ms for the operators'). The libraries'
    and the model's 400,000 objects stay as long as the process: the garbage collector need not walk
    them again (200 ms, in which no token is made).
    """
    for app in apps:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            await client.get("/health")
    gc.collect()
    gc.freeze()


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",  # run() holds it
        access_log=False,  # middleware.py writes one line per request
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,  # who connects is who asks: a header anybody can write decides nothing
        timeout_graceful_shutdown=LAST_BYTES_S,
    )


class AdminServer(uvicorn.Server):
    """Leaves signals to the other listener, and ends when it is told to."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(_config(app))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or []:
            host, port = sock.getsockname()[:2]
            log.info("operators on http://%s:%d", host, port)


class DrainingServer(uvicorn.Server):
    """On the first signal: 503 for what is new, until what runs has finished; then stop.

    On the second signal: stop at once, `beside` too. What runs ends with an error.
    """

    def __init__(
        self, app: FastAPI, services: Services, beside: uvicorn.Server | None = None
    ) -> None:
        super().__init__(_config(app))
        self._beside = beside
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so: from here on signals are handled."""
        await super().startup(sockets)
        for sock in sockets or []:
            host, port = sock.getsockname()[:2]
            log.info("serving %s on http://%s:%d", self._services.model_name, host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del frame
        is_second = self._services.in_flight.is_draining
        self._services.in_flight.is_draining = True
        react = self._stop_at_once if is_second else self._begin_draining
        self._loop.call_soon_threadsafe(react, signal.Signals(sig).name)

    def _begin_draining(self, name: str) -> None:
        log.info("%s: draining %d requests", name, self._services.in_flight.count)
        self._tasks.append(asyncio.create_task(self._drain()))

    def _stop_at_once(self, name: str) -> None:
        log.info("%s: ending %d requests", name, self._services.in_flight.count)
        self._tasks.append(asyncio.create_task(drain(self._services, timeout_s=0.0)))
        self.config.timeout_graceful_shutdown = 1  # for connections whose client does not read
        self.should_exit = self.force_exit = True
        if self._beside is not None:
            self._beside.should_exit = self._beside.force_exit = True

    async def _drain(self) -> None:
        try:
            await drain(self._services)
        finally:
            self.should_exit = True
