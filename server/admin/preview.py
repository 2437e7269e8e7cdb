"""One prompt under one policy at several alphas, side by side, for an operator's eyes only.

Goes through the same functions as a client's request, but for the tenant's limits, its rollout and
the kill switch, so that a policy can be tried before it is let loose. Nothing is stored or logged.
"""

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, Field, model_validator
from starlette.types import Receive

from server.admin.changes import Model, NewName
from server.convert import AnswerHead, WholeAnswer, engine_messages, sampling_params
from server.documents import PolicyFields
from server.engine.types import EngineRequest, QueueFullError
from server.errors import InvalidRequestError, RequestTimeoutError
from server.generation import Generation
from server.media import decode_images
from server.policy import Override, Policy, decide
from server.prompts import prepared
from server.protocol import ChatCompletionRequest, Message
from server.replies import ChatCompletion, SteeringReport, Usage
from server.services import Services
from server.steered import Steered
from steering.errors import PlanError

MAX_TOKENS = 512
MAX_ALPHAS = 4
NAMESPACE = "preview!"  # of the caches; no tenant can have this name


class PreviewBody(Model):
    """`messages` as in a chat completion; pictures as data: URLs."""

    tenant: NewName | None = Field(None, description="Whose policy; or else `policy`.")
    policy: PolicyFields | None = Field(None, description="A policy that need not be any tenant's.")
    messages: Annotated[list[Message], Field(min_length=1)]
    alphas: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = Field(
        [0.0, 0.8], max_length=MAX_ALPHAS, description="Within the policy's alpha_max."
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 128
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(0.0, description="0: greedy.")
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0

    @model_validator(mode="after")
    def _one_policy(self) -> "PreviewBody":
        if (self.tenant is None) == (self.policy is None):
            raise ValueError("give either a tenant or a policy")
        return self


class PreviewAnswer(BaseModel):
    alpha: float
    text: str
    finish_reason: str
    usage: Usage
    steering: SteeringReport


class PreviewAnswers(BaseModel):
    """In the order of `alphas`. revision: of the policy; 0 where it is no tenant's."""

    revision: int
    answers: list[PreviewAnswer]


@dataclass(frozen=True)
class _Prompt:
    """What every alpha is asked; `images` are decoded once."""

    wire: ChatCompletionRequest
    messages: list[dict[str, Any]]
    images: Sequence[Image.Image]


class PreviewDesk:
    """Runs one preview at a time: the rows are there for the tenants. Event loop only."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._is_busy = False

    async def preview(self, body: PreviewBody, client: Receive) -> PreviewAnswers:
        """One alpha after the other, so that each answer's overhead is its own.

        `client` is the ASGI receive channel after the body. Raises what a chat request raises;
        QueueFullError while another preview runs, NoSuchTenantError.
        """
        self._services.refuse_while_draining()
        with self._alone():
            policy = await self._policy(body)
            deadline = time.monotonic() + self._services.settings.request_timeout_s
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    prompt = await self._prompt(body)
                    answers = [
                        await self._answer(policy, alpha, prompt, client, deadline)
                        for alpha in body.alphas
                    ]
            except TimeoutError:
                raise RequestTimeoutError("the preview timed out") from None
        return PreviewAnswers(revision=policy.revision, answers=answers)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._is_busy:
            raise QueueFullError("another preview is running; try again when it is done")
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    async def _policy(self, body: PreviewBody) -> Policy:
        """With what would hide the steering taken away."""
        if body.policy is not None:
            policy = Policy.of(body.policy, 0)
        else:
            assert body.tenant is not None, "the body has one of both"
            held = await self._services.control.tenant(body.tenant)
            policy = Policy.of(held.document.in_force(time.time()), held.revision, held.name)
        for alpha in body.alphas:
            if alpha > policy.alpha_max:
                raise InvalidRequestError(
                    f"alpha {alpha:g} is over the policy's alpha_max {policy.alpha_max:g}",
                    param="alphas",
                )
        return replace(policy, client_override="any", rollout=100.0)

    async def _prompt(self, body: PreviewBody) -> _Prompt:
        services = self._services
        wire = ChatCompletionRequest(
            model=services.model_name,
            messages=body.messages,
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            seed=body.seed,
        )
        _refuse_half_characters(wire)
        images = await asyncio.get_running_loop().run_in_executor(
            services.pool, decode_images, wire.image_urls, services.media_limits
        )
        return _Prompt(wire, engine_messages(wire.messages), images)

    async def _answer(
        self, policy: Policy, alpha: float, prompt: _Prompt, client: Receive, deadline: float
    ) -> PreviewAnswer:
        services = self._services
        vectors = services.vectors.active(policy.vector_alias)
        try:
            plan = decide(policy, Override(alpha=alpha), bool(prompt.images), vectors)
            steering = services.vectors.steering(plan, vectors)
        except PlanError as error:
            raise InvalidRequestError(f"alpha {alpha:g}: {error}", param="alphas") from None
        inputs, plan = await asyncio.get_running_loop().run_in_executor(
            services.pool,
            prepared,
            services.engine,
            prompt.messages,
            prompt.images,
            plan,
            policy.on_error,
        )
        generation = Generation(services.engine, services.bridge)
        request = EngineRequest(
            request_id=f"preview-{uuid.uuid4().hex}",
            inputs=inputs,
            params=sampling_params(prompt.wire),
            plan=plan,
            steering=steering,
            emit=generation.emit,
            timeout_s=deadline - time.monotonic(),
            namespace=NAMESPACE,
            on_error=policy.on_error,
        )
        head = AnswerHead(request.request_id, int(time.time()), prompt.wire.model, 1, False)
        answer = WholeAnswer(head, Steered(plan, steering.max_dose))
        async with generation.running(request, client):
            async for events in generation.batches():
                for event in events:
                    answer.add(event)
        return _shown(alpha, ChatCompletion.model_validate_json(answer.body()))


def _refuse_half_characters(wire: ChatCompletionRequest) -> None:
    """JSON can spell half a character, which is no text."""
    try:
        wire.model_dump_json()
    except ValueError:
        message = "messages: holds half of a surrogate pair (\\ud800 to \\udfff)"
        raise InvalidRequestError(message, param="messages") from None


def _shown(alpha: float, completion: ChatCompletion) -> PreviewAnswer:
    (choice,) = completion.choices
    return PreviewAnswer(
        alpha=alpha,
        text=choice.message.content,
        finish_reason=choice.finish_reason,
        usage=completion.usage,
        steering=completion.steering,
    )
