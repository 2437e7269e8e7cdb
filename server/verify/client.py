"""One server under verification: chats about pictures that nobody has asked about, told apart by
the log-probabilities of their answers. Does not judge (remote.py).
"""

import json
import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from server.bench.prompts import NUM_CODES, Message, Prompts
from server.verify.check import RefusedError, VerifyError
from steering.demo.pictures import example

TOP = 20
MAX_MESSAGE_LEN = 300
Wish = Mapping[str, Any]
OFF: Wish = {"mode": "off"}


@dataclass(frozen=True)
class Answer:
    """tokens: what was chosen. tops: at each, the likeliest tokens' log-probabilities, by bytes.
    header: the fields of x-deshift-steering. revisions: each that a chunk of a stream names."""

    tokens: tuple[bytes, ...]
    tops: tuple[Mapping[bytes, float], ...]
    header: Mapping[str, str]
    steering: Mapping[str, Any]
    cached_tokens: int = 0
    revisions: tuple[int | None, ...] = ()

    @property
    def mode(self) -> str:
        return str(self.steering.get("mode"))

    @property
    def is_steered(self) -> bool:
        return self.mode != "off"


def gap(one: Answer, other: Answer) -> float:
    """The largest difference of log-probabilities of the tokens that both name, as far as both
    answers have said the same before: after that they are asked different things.

    Infinite where they have no token in common, or are not numbers.
    """
    worst = 0.0
    for place, (left, right) in enumerate(zip(one.tops, other.tops, strict=False)):
        both = left.keys() & right.keys()
        differences = [abs(left[token] - right[token]) for token in both]
        worst = max([worst, *differences]) if both else math.inf
        if not all(difference >= 0 for difference in differences):  # NaN
            return math.inf
        if one.tokens[place] != other.tokens[place]:
            break
    return worst if one.tops and other.tops else math.inf


@dataclass
class Asker:
    """Asks one server. `answered` counts its answers by the mode that each says, `refused` the
    others; `doses` are what steered ones say. Every `fresh` prompt is one that nobody has asked."""

    client: httpx.AsyncClient
    model: str
    answered: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    doses: list[float] = field(default_factory=list)
    start: int = field(default_factory=lambda: secrets.randbelow(NUM_CODES))
    _num_prompts: int = 0

    def fresh(self, num_words: int = 6, *, has_picture: bool = True) -> list[Message]:
        """A rendered picture, or none, and a text of so many words."""
        self._num_prompts += 1
        number = self.start + self._num_prompts
        prompts = Prompts(example(number).image, number)
        (message,) = prompts.text(0, num_words)
        if not has_picture:
            return [message]
        picture = {"type": "image_url", "image_url": {"url": prompts.picture(0)}}
        text = {"type": "text", "text": message["content"]}
        return [{"role": "user", "content": [picture, text]}]

    async def ask(
        self,
        messages: Sequence[Message],
        wish: Wish | None = None,
        *,
        max_tokens: int = 6,
        is_stream: bool = False,
    ) -> Answer:
        """Greedy, with exactly `max_tokens` tokens; `wish`: the request's steering field.

        Raises RefusedError, VerifyError.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": TOP,
        }
        if wish is not None:
            body["steering"] = dict(wish)
        if is_stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            response = await self.client.post("/v1/chat/completions", json=body)
        except httpx.RequestError as error:
            raise _unreachable(self.client, error) from None
        if response.status_code != 200:
            self.refused += 1
            raise _refusal(response, self.client)
        answer = _streamed(response) if is_stream else _whole(response)
        self.answered[answer.mode] += 1
        if answer.is_steered:
            self.doses.append(float(answer.steering.get("relative_dose", math.inf)))
        return answer


async def connect(client: httpx.AsyncClient, model: str | None) -> tuple[Asker, Mapping[str, Any]]:
    """An asker, and what /ready says. Raises VerifyError where nothing of ours answers."""
    try:
        listed = await client.get("/v1/models")
        ready = await client.get("/ready")
    except httpx.RequestError as error:
        raise _unreachable(client, error) from None
    if listed.status_code in (401, 403):
        raise VerifyError(
            f"{client.base_url} refuses to be asked ({listed.status_code}): name the environment "
            "variable that holds its key with --api-key-env"
        )
    models = _object(listed).get("data") or []
    if not model and not models:
        raise VerifyError(f"{client.base_url} lists no models: name one with --model")
    if ready.status_code == 503:
        detail = json.dumps(_object(ready))[:MAX_MESSAGE_LEN]
        raise VerifyError(f"{client.base_url} is not ready: {detail}")
    return Asker(client, model or str(models[0]["id"])), _object(ready)


def _whole(response: httpx.Response) -> Answer:
    return _answer(response, [_object(response)])


def _streamed(response: httpx.Response) -> Answer:
    lines = response.text.replace("\r\n", "\n").split("\n\n")
    frames = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
    events = [json.loads(frame) for frame in frames if frame != "[DONE]"]
    if failed := next((event["error"] for event in events if "error" in event), None):
        raise RefusedError(200, str(failed.get("code")), str(failed.get("message")))
    revisions = dict.fromkeys(event.get("steering_revision") for event in events)
    return _answer(response, events, tuple(revisions))


def _answer(
    response: httpx.Response, parts: Sequence[Mapping[str, Any]], revisions: Any = ()
) -> Answer:
    """Of one body or of a stream's chunks."""
    try:
        choices = [choice for part in parts for choice in part.get("choices") or ()]
        said = [token for c in choices for token in (c.get("logprobs") or {}).get("content") or ()]
        usage: Mapping[str, Any] = next((p["usage"] for p in parts if p.get("usage")), {})
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            tokens=tuple(bytes(token["bytes"]) for token in said),
            tops=tuple(
                {bytes(top["bytes"]): float(top["logprob"]) for top in token["top_logprobs"]}
                for token in said
            ),
            header=_fields(response.headers.get("x-deshift-steering", "")),
            steering=next((p["steering"] for p in parts if p.get("steering")), {}),
            cached_tokens=int(details.get("cached_tokens") or 0),
            revisions=revisions,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RefusedError(200, "malformed", "the answer is no chat completion") from None


def _fields(header: str) -> dict[str, str]:
    pairs = [part.strip().partition("=") for part in header.split(";") if part.strip()]
    return {name: value for name, _, value in pairs}


def _refusal(response: httpx.Response, client: httpx.AsyncClient) -> RefusedError:
    error = _object(response).get("error")
    error = error if isinstance(error, dict) else {}
    message = str(error.get("message") or response.reason_phrase)[:MAX_MESSAGE_LEN]
    if key := client.headers.get("authorization", "").removeprefix("Bearer "):
        message = message.replace(key, "***")  # some servers quote it
    return RefusedError(response.status_code, str(error.get("code")), message)


def _unreachable(client: httpx.AsyncClient, error: Exception) -> VerifyError:
    problem = str(error) or type(error).__name__
    return VerifyError(f"no server answers at {client.base_url}: {problem}")


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
