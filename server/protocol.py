"""The wire format of chat completions: what a request may hold (answers: replies.py).

A field that would change the output and is not honoured is refused by name; fields that change
nothing here are dropped by list. Nothing past convert.py sees these models.
"""

import json
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from server.config import GateText
from server.errors import InvalidRequestError
from steering.corruption import Corruption
from steering.errors import PlanError
from steering.plan import Method, Mode, Schedule

# Accepted and ignored: they say how it is billed or stored, or how fast it should be.
IGNORED_FIELDS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "service_tier",
        "store",
    }
)
# Not honoured: only the values that ask for nothing are accepted.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class Wire(BaseModel):
    """Strict: a number in a string, or a field nobody knows, is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Echoed(Wire):
    """A piece of history. Clients give back what their libraries made of it: an unknown field that
    holds nothing (null, or []) is ignored, and `ignored` ones whatever they hold.
    """

    ignored: ClassVar[frozenset[str]] = frozenset({"cache_control"})

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {
            name: held
            for name, held in value.items()
            if name in cls.model_fields or not (held in (None, []) or name in cls.ignored)
        }


class TextPart(Echoed):
    type: Literal["text"]
    text: str


class RefusalPart(Echoed):
    type: Literal["refusal"]
    refusal: str


def _image_object(value: object) -> object:
    if isinstance(value, str):
        raise ValueError('must be an object such as {"url": "data:image/png;base64,..."}')
    return value


class ImageUrl(Echoed):
    """`detail` is accepted and has no effect: the model's processor decides the resolution."""

    ignored = frozenset({"format"})  # what the bytes are decides
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Echoed):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_image_object)]


def _as_parts(value: object) -> object:
    """A string is one text part, so that everything after sees parts."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or an array of content parts that is not empty")
    return value


UserPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
AssistantPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class SystemMessage(Echoed):
    """`developer` is OpenAI's newer name of `system`. `name` is accepted and ignored throughout."""

    role: Literal["system", "developer"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]
    name: str | None = None


class UserMessage(Echoed):
    role: Literal["user"]
    content: Annotated[list[UserPart], BeforeValidator(_as_parts)]
    name: str | None = None


class AssistantMessage(Echoed):
    """An earlier answer; without content and refusal an empty one. Calls of tools are refused."""

    ignored = Echoed.ignored | {
        "annotations",
        "provider_specific_fields",
        "reasoning",
        "reasoning_content",
    }
    role: Literal["assistant"]
    content: Annotated[list[AssistantPart], BeforeValidator(_as_parts)] | None = None
    refusal: str | None = None
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Wire):
    """`include_obfuscation` is accepted and ignored: padding, not content."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SteeringOverride(Wire):
    """A request's wish; policy.py says how far it is heard. Absent or null: the policy's value."""

    mode: Mode | None = None
    alpha: Annotated[float, Field(ge=0)] | None = None
    schedule: str | None = None
    corruption: Corruption | None = None
    method: Method | None = None
    gate: GateText | None = None

    @field_validator("schedule")
    @classmethod
    def _valid_schedule(cls, text: str | None) -> str | None:
        try:
            return text if text is None else str(Schedule.parse(text))
        except PlanError as error:
            raise ValueError(str(error)) from None


StopString = Annotated[str, Field(min_length=1, max_length=256)]
INT64 = 2**63


class ChatCompletionRequest(Wire):
    """The fields that are honoured."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] | None = None
    logit_bias: (
        dict[
            Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
            Annotated[float, Field(ge=-100, le=100)],
        ]
        | None
    ) = None
    stop: Annotated[list[StopString], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    ignore_eos: bool | None = None
    steering: SteeringOverride | None = None
    user: str | None = None
    safety_identifier: str | None = None

    @field_validator("max_tokens", mode="before")
    @classmethod
    def _unlimited(cls, value: object) -> object:
        """Local user interfaces send -1."""
        return None if type(value) is int and value == -1 else value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("stream_options")
    @classmethod
    def _only_streaming(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("is allowed only with stream: true")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("is allowed only with logprobs: true")
        return value

    @property
    def end_user(self) -> str | None:
        """Who asks the client, as far as it says so; a rollout counts by it."""
        return self.user or self.safety_identifier or None

    @property
    def image_urls(self) -> list[str]:
        """Of all messages, in order."""
        return [
            part.image_url.url
            for message in self.messages
            if isinstance(message, UserMessage)
            for part in message.content
            if isinstance(part, ImagePart)
        ]


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """Parse and validate a request body. Raises InvalidRequestError naming the field."""
    data = _parse_json(body)
    honoured = {}
    for name, value in data.items():
        if name in IGNORED_FIELDS or (name in NEUTRAL_VALUES and value is None):
            continue
        if name in NEUTRAL_VALUES:
            if not any(value == neutral for neutral in NEUTRAL_VALUES[name]):
                raise InvalidRequestError(
                    f"{name} is not supported here: leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
            continue
        if name not in ChatCompletionRequest.model_fields:
            raise InvalidRequestError(
                f"unknown field {name[:80]!r}", param=name[:80], code="unknown_parameter"
            )
        honoured[name] = value
    try:
        return ChatCompletionRequest.model_validate(honoured)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        param = _path(problem, honoured)
        raise InvalidRequestError(f"{param}: {_message(problem)}", param=param) from None


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise InvalidRequestError("the body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object", code="invalid_json")
    if b"\\ud" in body.lower():
        _refuse_half_surrogates(data)
    return data


def _refuse_half_surrogates(data: object) -> None:
    """JSON can spell half a character, which is no text: no tokenizer or answer can hold it."""
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except RecursionError:  # what was just within reach of the parser need not be of this
        raise InvalidRequestError("the body is nested too deeply", code="invalid_json") from None
    except UnicodeEncodeError:
        message = "the body holds half of a surrogate pair (\\ud800 to \\udfff)"
        raise InvalidRequestError(message, code="invalid_json") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _path(problem: Any, data: object) -> str:
    """`messages[0].content[1].image_url`: pydantic's location without its union tags."""
    path = ""
    is_missing = problem["type"] == "missing"
    for position, step in enumerate(problem["loc"], start=1):
        is_last = position == len(problem["loc"])
        if isinstance(step, int):
            path += f"[{step}]"
            data = data[step] if isinstance(data, list) and step < len(data) else None
        elif isinstance(data, dict) and (step in data or (is_missing and is_last)):
            path += f".{step}" if path else step
            data = data.get(step)
    return path or "body"


def _message(problem: Any) -> str:
    """Pydantic's words without its class names; never the value."""
    match problem["type"]:
        case "model_type" | "model_attributes_type" | "dict_type":
            return "must be an object"
        case "extra_forbidden":
            return "is not supported here: leave it out"
        case "missing":
            return "is required"
    return str(problem["msg"].removeprefix("Value error, "))
