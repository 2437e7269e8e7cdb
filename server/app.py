"""The application factory: the only place that builds and wires objects; the lifespan.

Does not cover sockets and signals (serve.py).
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.config import PREFIX, Settings
from server.control import Control
from server.directory import TenantDirectory
from server.documents import PolicyFields
from server.engine.api import Engine
from server.engine.threads import take_one_core
from server.engine.types import EngineError
from server.errors import ConfigError, ServerError, error_response
from server.heartbeat import Heartbeat, replica_name, replica_status
from server.logs import log_request
from server.media import MediaLimits
from server.metrics.metrics import Metrics, process_registry
from server.metrics.tenants import TenantLabels
from server.middleware import Auth, BodyLimit, LoopbackHost, RateLimits, RequestContext
from server.policy import default_fields
from server.record import Observer
from server.routes import chat, models, status
from server.services import BodyBudget, Services
from server.sync import Sync
from server.tasks import ended
from server.timed_store import TimedStore
from server.vectors import VectorCatalogue
from steering.errors import PlanError, StoreError
from steering.plan import Schedule
from steering.stores import Store, open_store

if TYPE_CHECKING:
    from server.tracing import RequestTracer

log = logging.getLogger("deshift")
START_WAIT_S = 3.0  # for the store; then the server starts without it, as `cold_start` says
ERRORS_WITH_A_STATUS = (ServerError, EngineError, HTTPException)


def create_app(
    settings: Settings, *, engine: Engine | None = None, store: Store | None = None
) -> FastAPI:
    """Build the server. Without `engine` this loads the model: slow, and raises what that raises.

    `engine` is started and drained by the lifespan, whoever built it; `store` is closed by it
    only if it was opened here. With `admin_store` set, operators' changes go there.
    """
    open_tracer = tracing(settings)  # first: a missing extra costs no loaded model
    opened: list[Store] = []

    def open_own(url: str) -> Store:
        opened.append(open_store(url))
        return opened[-1]

    store = store or open_own(settings.store_url)
    writable = store if settings.admin_store is None else open_own(settings.admin_store)
    services = build_services(settings, engine or build_engine(settings), store, writable)
    tracer = None if open_tracer is None else open_tracer(settings, services.model_name)
    app = FastAPI(
        lifespan=lambda _: _lifespan(services, opened, tracer),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    for module in (chat, models, status):
        app.include_router(module.router)
    for kind in ERRORS_WITH_A_STATUS:
        app.add_exception_handler(kind, _answer_error)
    observers: list[Observer] = [log_request, services.metrics.observe_request]
    if tracer is not None:
        observers.insert(0, tracer.observe)  # the trace's id stands in the log line
    _add_middleware(app, services, observers)
    return app


@asynccontextmanager
async def _lifespan(
    services: Services, stores: Sequence[Store], tracer: "RequestTracer | None"
) -> AsyncIterator[None]:
    """stores: those to close at the end."""
    try:
        async with running(services):
            yield
    finally:
        for each in stores:
            with suppress(StoreError):  # a lost one, too, has let go of what it held
                await each.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


def _add_middleware(app: FastAPI, services: Services, observers: Sequence[Observer]) -> None:
    """From the innermost to the outermost."""
    settings, directory = services.settings, services.directory
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, budget=services.bodies)
    app.add_middleware(RateLimits, directory=directory, limits=services.limits)
    app.add_middleware(Auth, settings=settings, directory=directory)
    if settings.api_key is None:
        app.add_middleware(LoopbackHost)  # Settings let nothing but loopback do without a key
    app.add_middleware(RequestContext, in_flight=services.in_flight, observers=observers)


def tracing(settings: Settings) -> "Callable[[Settings, str], RequestTracer] | None":
    """What opens the tracer, where one is wanted. Raises ConfigError without the extra."""
    if settings.tracing == "off":
        return None
    try:
        from server.tracing import open_tracer
    except ImportError as error:
        raise ConfigError(
            f"{PREFIX}TRACING is otlp and OpenTelemetry is not installed ({error.name}): "
            "install deshift[otel]"
        ) from None
    return open_tracer


def build_engine(settings: Settings) -> Engine:
    """Load the model and put the embedded engine around it; the engine is not started."""
    from server.engine.engine import EmbeddedEngine, EngineConfig
    from steering.layers import text_config
    from steering.models import load_model

    if settings.model is None:
        raise ServerError("no model to serve: pass --model or set DESHIFT_MODEL")
    take_one_core()
    loaded = load_model(
        settings.model, revision=settings.revision, dtype=settings.dtype, device=settings.device
    )
    positions = getattr(text_config(loaded.model), "max_position_embeddings", None)
    config = EngineConfig(
        max_model_len=min(settings.max_model_len, positions or settings.max_model_len),
        max_rows=settings.max_rows,
        kv_tokens=settings.kv_tokens,
        max_queue=settings.max_queue,
        prefill_chunk=settings.prefill_chunk,
        prefix_cache_bytes=settings.prefix_cache_bytes,
        vision_cache_bytes=settings.vision_cache_bytes,
        decoder=settings.decoder,
    )
    return EmbeddedEngine(loaded, config)


def build_services(settings: Settings, engine: Engine, store: Store, writable: Store) -> Services:
    """Raises ConfigError for a schedule that the model has no layers for."""
    directory = TenantDirectory(_fitting_fields(settings, engine.identity.num_layers))
    metrics = Metrics(
        settings.served_model_name or engine.identity.model_id,
        TenantLabels(directory, settings.metrics_tenants),
        process_registry(),
    )
    is_one = writable is store
    store = TimedStore(store, metrics.observe_store)
    writable = store if is_one else TimedStore(writable, metrics.observe_store)
    vectors = VectorCatalogue(store, engine.identity)
    sync = Sync(store, directory, vectors, settings.sync_interval_s)
    replica, started_at = replica_name(settings), time.time()
    heartbeat = Heartbeat(
        store,
        replica,
        settings.sync_interval_s,
        lambda: replica_status(replica, settings, engine, directory, vectors, sync, started_at),
        sync.changed,
    )
    return Services(
        settings=settings,
        engine=engine,
        store=store,
        control=Control(writable),
        directory=directory,
        vectors=vectors,
        sync=sync,
        heartbeat=heartbeat,
        media_limits=_media_limits(settings),
        created=int(started_at),
        pool=ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="prepare"),
        bodies=BodyBudget(settings.max_buffered_bytes),
        metrics=metrics,
    )


def _fitting_fields(settings: Settings, num_layers: int) -> PolicyFields:
    fields = default_fields(settings)
    try:
        Schedule.parse(fields.schedule).layers(num_layers)
    except PlanError as error:
        raise ConfigError(f"{PREFIX}SCHEDULE: {error}") from None
    return fields


def _media_limits(settings: Settings) -> MediaLimits:
    return MediaLimits(
        max_images=settings.max_images,
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        max_aspect=settings.max_image_aspect,
    )


@asynccontextmanager
async def running(services: Services) -> AsyncIterator[None]:
    """Start engine and vectors; on leaving, drain and stop everything. Raises EngineError.

    Vectors that are missing or wrong do not stop the start: /ready says so, requests that need
    them get what `on_error` says, and a set that is activated later is taken up.
    """
    services.bridge.bind(asyncio.get_running_loop())
    try:
        await asyncio.to_thread(services.engine.start)
        take_one_core()
        async with following(services):
            yield
    finally:
        await drain(services)
        services.pool.shutdown(wait=False, cancel_futures=True)


@asynccontextmanager
async def following(services: Services) -> AsyncIterator[None]:
    """Keep in step with the store; wait a little for the first documents and their vectors."""
    tasks = [asyncio.create_task(services.sync.run(), name="sync")]
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(START_WAIT_S):
                await services.sync.wait_for_first_look()
                if services.directory.is_synced:
                    await services.vectors.wait_until_settled()
        tasks.append(asyncio.create_task(services.heartbeat.run(), name="heartbeat"))
        yield
    finally:
        await ended(*tasks)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("%s ended", task.get_name(), exc_info=error)
        await services.vectors.close()


async def drain(services: Services, timeout_s: float | None = None) -> None:
    """Refuse what is new with 503, let what runs finish, stop the engine.

    What runs has drain_timeout_s, or `timeout_s`; a later call can only shorten it.
    """
    services.in_flight.is_draining = True
    timeout_s = services.settings.drain_timeout_s if timeout_s is None else timeout_s
    await asyncio.to_thread(services.engine.drain, timeout_s)


async def _answer_error(_: Request, error: Exception) -> Response:
    return error_response(error)
