"""POST /v1/chat/completions: one request, from its body to its last byte.

body -> wire model -> the tenant's policy -> plan -> pictures and prompt (thread pool) -> engine ->
events -> answer.
One deadline, set on arrival, holds for all of it.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive

from server.answers import StreamResponse, WholeResponse
from server.convert import AnswerHead, engine_messages, override_of, sampling_params
from server.engine.types import EngineInputs, EngineRequest, OnError, QueueFullError
from server.errors import InvalidRequestError, RequestTimeoutError
from server.generation import ClientLeftError, Generation, until_left
from server.media import decode_images
from server.middleware import body_share_of, principal_of
from server.policy import Policy, decide, unsteerable
from server.probes import is_probed, reference_of
from server.prompts import prepared
from server.protocol import ChatCompletionRequest, parse_chat
from server.record import RequestRecord, record_of
from server.routes.models import check_model
from server.services import Services, services_of
from server.steered import Overhead, Steered
from steering.errors import PlanError
from steering.methods import RowSteering
from steering.plan import SteeringPlan

log = logging.getLogger("deshift.steering")
router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    services, record = services_of(request), record_of(request.scope)
    _refuse_overload(services)
    deadline = record.started + services.settings.request_timeout_s
    async with _until(deadline):
        wire = parse_chat(await _body(request))
        check_model(services, wire.model)
        _check_num_choices(services, wire)
        record.has_images, record.is_streamed = bool(wire.image_urls), bool(wire.stream)
        with record.timed("admission"):
            policy = services.directory.policy(principal_of(request.scope).tenant, time.time())
        plan, steering = _steering(services, wire, policy, record)
        record.steered = Steered(plan)
        inputs, plan = await _prepared(
            services, wire, plan, policy.on_error, record, request.receive
        )
    _warn_of_failed_shift(plan, record)
    body_share_of(request.scope).release()
    generation = Generation(services.engine, services.bridge)
    engine_request = EngineRequest(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        inputs=inputs,
        params=sampling_params(wire),
        plan=plan,
        steering=steering,
        emit=generation.emit,
        timeout_s=deadline - time.monotonic(),
        namespace=policy.tenant,
        on_error=policy.on_error,
        probe=is_probed(services.settings.probe_share, record.has_images),
        reference=reference_of(services.vectors.active(policy.vector_alias)),
    )
    head = _head(wire, engine_request)
    steered = record.steered = Steered(plan, steering.max_dose, _overhead_so_far(record))
    if not wire.stream:
        return WholeResponse(generation, engine_request, record, head, steered)
    include_usage = bool(wire.stream_options and wire.stream_options.include_usage)
    return StreamResponse(generation, engine_request, record, head, steered, include_usage)


def _warn_of_failed_shift(plan: SteeringPlan, record: RequestRecord) -> None:
    if plan.reason == "shift-failed":  # why is not logged: templates put conversations into errors
        text = "request_id=%s unsteered: its shift cannot be measured"
        log.warning(text, record.request_id, extra=record.ids)


def _overhead_so_far(record: RequestRecord) -> Overhead:
    stages = record.stages
    return Overhead(
        store_s=stages.get("store", 0.0),
        admission_s=stages.get("admission", 0.0) + stages.get("pair", 0.0),
    )


def _head(wire: ChatCompletionRequest, engine_request: EngineRequest) -> AnswerHead:
    return AnswerHead(
        id=engine_request.request_id,
        created=int(time.time()),
        model=wire.model,
        num_choices=engine_request.params.n,
        with_logprobs=bool(wire.logprobs),
    )


def _refuse_overload(services: Services) -> None:
    """Refuse what the engine could not hold anyway before its pictures cost anything."""
    services.refuse_while_draining()
    room = services.settings.max_rows + services.settings.max_queue
    if services.in_flight.count > room:
        raise QueueFullError(f"{room} requests are running or waiting already; try again later")


def _check_num_choices(services: Services, wire: ChatCompletionRequest) -> None:
    limit = min(services.settings.max_n, services.settings.max_rows)
    if wire.n is not None and wire.n > limit:
        raise InvalidRequestError(f"n: {wire.n}; the limit is {limit}", param="n")


@asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    """Raises RequestTimeoutError at `deadline` (monotonic), wherever the block is then."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            yield
    except TimeoutError:
        raise RequestTimeoutError("the request timed out before its generation began") from None


async def _body(request: Request) -> bytes:
    """Read here, since Request.body() would keep it as long as the answer takes."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # also keeps other sites' forms off a loopback server
        raise InvalidRequestError("the content-type must be application/json")
    return b"".join([chunk async for chunk in request.stream()])


def _steering(
    services: Services, wire: ChatCompletionRequest, policy: Policy, record: RequestRecord
) -> tuple[SteeringPlan, RowSteering]:
    """Fix the plan, with one look at the vectors, for the request's life."""
    vectors = services.vectors.active(policy.vector_alias)
    key_id = record.principal.key_id if record.principal else ""
    try:
        with record.timed("admission"):
            plan = decide(
                policy,
                override_of(wire.steering),
                bool(wire.image_urls),
                vectors,
                kill=services.directory.kill,
                unit=wire.end_user or key_id,
            )
        with record.timed("store"):
            return plan, services.vectors.steering(plan, vectors)
    except PlanError as error:
        if wire.steering is None:  # then it is the operators' doing, not the client's
            return unsteerable(policy, policy.mode, str(error)), RowSteering()
        raise InvalidRequestError(str(error), param="steering") from None


async def _prepared(
    services: Services,
    wire: ChatCompletionRequest,
    plan: SteeringPlan,
    on_error: OnError,
    record: RequestRecord,
    client: Receive,
) -> tuple[EngineInputs, SteeringPlan]:
    """Pictures and prompt, made in the pool, and the plan that can be followed with them.

    What the pool has not begun when the deadline passes or the client leaves is never begun.
    Raises ClientLeftError.
    """
    loop = asyncio.get_running_loop()
    work = loop.run_in_executor(services.pool, _prepare, services, wire, plan, on_error, record)
    left = asyncio.create_task(until_left(client))
    try:
        either: set[asyncio.Future[Any]] = {work, left}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientLeftError
        return work.result()
    finally:
        work.cancel()
        left.cancel()


def _prepare(
    services: Services,
    wire: ChatCompletionRequest,
    plan: SteeringPlan,
    on_error: OnError,
    record: RequestRecord,
) -> tuple[EngineInputs, SteeringPlan]:
    with record.timed("media"):
        images = decode_images(wire.image_urls, services.media_limits)
    messages = engine_messages(wire.messages)
    with record.timed("prepare"):
        inputs, plan = prepared(services.engine, messages, images, plan, on_error)
    if plan.corruption_in_force is not None:
        record.stages["pair"] = inputs.pair_s
        record.stages["prepare"] -= inputs.pair_s
    return inputs, plan
