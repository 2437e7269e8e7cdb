"""Frozen settings; the only reader of the environment.

Every field is DESHIFT_<NAME> in the environment. Nothing is mutated after construction.
"""

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from server.engine.types import OnError
from server.errors import ConfigError
from steering.corruption import Corruption
from steering.errors import PlanError
from steering.plan import Gate, Method, Mode, Schedule

PREFIX = "DESHIFT_"
ADMIN_KEY = "DESHIFT_ADMIN_KEY"  # of commands that talk to an admin listener; no setting
ClientOverride = Literal["none", "strengthen", "any"]
MIB = 1024 * 1024
MIN_ADMIN_KEY_LEN = 16
_ADMIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


def _schedule(text: str) -> str:
    try:
        return str(Schedule.parse(text))
    except PlanError as error:
        raise ValueError(str(error)) from None


ScheduleText = Annotated[str, AfterValidator(_schedule)]


def _gate(text: str) -> str:
    """The normal form of a gate. Raises ValueError."""
    try:
        return str(Gate.parse(text) or "none")
    except PlanError as error:
        raise ValueError(str(error)) from None


GateText = Annotated[str, AfterValidator(_gate)]


class Settings(BaseModel):
    """What an operator decides; construct it, or read it with `from_env`. Raises ConfigError."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(
        None, description="Bearer key that clients send; without one only a loopback host is bound."
    )

    model: str | None = Field(None, description="Directory or hub id of the model.")
    revision: str | None = Field(None, description="Revision of a hub model.")
    served_model_name: str | None = Field(
        None, description="Name that requests use; by default the model's own."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Number format of weights and states."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    max_model_len: int = Field(
        4096, ge=16, description="Longest prompt plus answer, in tokens; at most the model's own."
    )
    max_rows: int = Field(16, ge=1, description="Sequences that are decoded together.")
    kv_tokens: int | None = Field(
        None, ge=16, description="KV cache budget in tokens; by default max_rows * max_model_len."
    )
    max_queue: int = Field(256, ge=1, description="Requests that may wait; beyond it 429.")
    prefill_chunk: int = Field(1024, ge=1, description="Prompt tokens prefilled per step at most.")
    prefix_cache_bytes: int = Field(
        512 * MIB, ge=0, description="Keys and values of earlier prompts that are kept; 0: none."
    )
    vision_cache_bytes: int = Field(
        64 * MIB, ge=0, description="Vision features of earlier pictures that are kept; 0: none."
    )
    decoder: Literal["auto", "eager", "fused", "compiled"] = Field(
        "auto",
        description="How the language model is run: fused is this project's own pass for "
        "Llama-like decoders, compiled the same with kernels between its products that are "
        "built at start (CPU only; needs g++), eager the model's own modules under hooks; auto "
        "takes compiled where it can, else fused for the decoder classes it is tested with, else "
        "eager.",
    )

    request_timeout_s: float = Field(600.0, gt=0, description="Longest life of one request.")
    drain_timeout_s: float = Field(
        30.0, ge=0, description="How long running answers may go on after SIGTERM."
    )
    max_body_bytes: int = Field(32 * MIB, ge=1024, description="Largest request body.")
    max_buffered_bytes: int = Field(
        512 * MIB,
        ge=1024,
        description="Bytes of all request bodies that are held at once; beyond it 429.",
    )
    max_image_bytes: int = Field(10 * MIB, ge=1, description="Largest encoded image.")
    max_image_pixels: int = Field(
        25_000_000, ge=1, description="Largest image, width times height, read before decoding."
    )
    max_image_aspect: float = Field(
        50.0, ge=1, description="Largest ratio of an image's sides; processors scale the short one."
    )
    max_images: int = Field(8, ge=0, description="Most images in one request.")
    max_n: int = Field(8, ge=1, description="Most choices (n) in one request.")

    steering_mode: Mode = Field(
        "dataset",
        description="off, dataset (a vector set's shift; without valid vectors: not ready) or "
        "sample (each request's own shift, measured by two more prompts; needs no vectors).",
    )
    alpha: float = Field(1.0, ge=0, description="Strength; 0 is an exact no-op.")
    alpha_max: float = Field(2.0, ge=0, description="Largest alpha that any request may get.")
    schedule: ScheduleText = Field(
        "all", description="all, incremental, range:a-b, single:l or incremental:a-b."
    )
    method: Method = Field(
        "subtract",
        description="subtract takes the shift away, safety-projected its part along the refusal "
        "direction, project the state's own part in the shifts' subspace (mode dataset only).",
    )
    gate: GateText = Field(
        "none",
        description="layer:threshold:temperature makes alpha the most that a prompt gets, by how "
        "harmful its state reads at that layer; none gives every prompt all of it.",
    )
    vector_alias: str = Field("default", min_length=1, description="Name of the vector set.")
    corruption: Corruption = Field(
        "blank",
        description="What mode sample replaces pictures by to measure their shift: blank, noise, "
        "gray or mean-colour.",
    )
    on_error: OnError = Field(
        "reject",
        description="What happens to requests that are to be steered and cannot be (no valid "
        "vectors; no shift measured): reject, or serve-unsteered, which the answer says.",
    )
    client_override: ClientOverride | None = Field(
        None,
        description="What a request's steering field may change: none, strengthen or any; "
        "by default none, but any on a loopback host without an API key.",
    )
    max_relative_dose: float = Field(
        1.0,
        gt=0,
        description="Cap of alpha * |Delta| / |h| at every layer, since models babble beyond it: "
        "dataset refuses more, sample scales it down.",
    )
    probe_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the requests with pictures whose last prompt token runs once more, "
        "unsteered, to show how far the prompt lies from text.",
    )

    cache: Path = Field(
        Path("~/.cache/deshift"), description="Directory of the store and assembled models."
    )
    store: str | None = Field(
        None,
        description="Store of vectors, tenants and policies: sqlite:///path, redis://..., "
        "rediss://..., redis+sentinel://... or memory://; by default sqlite:///<cache>/deshift.db.",
    )
    admin_store: str | None = Field(
        None,
        description="The same store with rights to write, for the admin listener; "
        "by default `store` itself.",
    )
    replica: str | None = Field(
        None, description="Name of this replica in the fleet; by default host name and port."
    )
    sync_interval_s: float = Field(
        1.0,
        gt=0,
        le=3600,
        description="How often the store is read even if it announces nothing, and told of this "
        "replica; a lost announcement heals within it.",
    )
    cold_start: Literal["default-policy", "refuse"] = Field(
        "default-policy",
        description="Until the store has been read for the first time: default-policy serves who "
        "needs no tenant's key by the policy of these settings, refuse answers 503 to everybody.",
    )

    admin_host: str = Field(
        "127.0.0.1", description="Address of the admin listener (API, console); never a public one."
    )
    admin_port: int = Field(
        8001, ge=0, le=65535, description="Its port; 0 takes a free one; equal to `port`: refused."
    )
    admin_keys: SecretStr | None = Field(
        None,
        description="Who may operate: name:key, several separated by commas; "
        "without any, the admin listener answers its status pages only.",
    )

    metrics_tenants: int = Field(
        200,
        ge=0,
        le=10_000,
        description="How many tenants have a label of their own in the metrics, beside the default "
        "one; the rest are `other`.",
    )

    log_format: Literal["text", "json"] = Field(
        "text", description="The log on stderr: text, or json with one object a line."
    )
    tracing: Literal["off", "otlp"] = Field(
        "off",
        description="off, or otlp: traces of chat requests to an OpenTelemetry collector, which "
        "the standard OTEL_* variables name; needs the extra `otel`.",
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] = os.environ, overrides: Mapping[str, object] | None = None
    ) -> Self:
        """Read every DESHIFT_ variable; `overrides` (command-line flags, by field) win.

        A variable that names no setting is refused, so that a misspelt one is not ignored.
        """
        values: dict[str, object] = {}
        for variable, value in environ.items():
            if not variable.startswith(PREFIX) or variable == ADMIN_KEY:
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in cls.model_fields:
                close = difflib.get_close_matches(name, cls.model_fields, n=1)
                hint = f"; did you mean {PREFIX}{close[0].upper()}?" if close else ""
                raise ConfigError(f"{variable} is not a setting{hint}")
            values[name] = value
        return cls(**{**values, **(overrides or {})})

    @field_validator("api_key")
    @classmethod
    def _usable_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is None:
            return None
        text = key.get_secret_value()
        if not text or not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError("must be printable ASCII without spaces, and not empty")
        return key

    @field_validator("admin_keys")
    @classmethod
    def _named_keys(cls, keys: SecretStr | None) -> SecretStr | None:
        if keys is not None:
            parse_admin_keys(keys.get_secret_value())
        return keys

    @field_validator("cache")
    @classmethod
    def _expanded(cls, path: Path) -> Path:
        return path.expanduser()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.alpha > self.alpha_max:
            raise ValueError(
                f"{PREFIX}ALPHA {self.alpha:g} is over {PREFIX}ALPHA_MAX {self.alpha_max:g}"
            )
        if self.max_body_bytes > self.max_buffered_bytes:
            raise ValueError(
                f"{PREFIX}MAX_BODY_BYTES {self.max_body_bytes} is over "
                f"{PREFIX}MAX_BUFFERED_BYTES {self.max_buffered_bytes}: no such body could be held"
            )
        if self.api_key is None and not self.is_loopback:
            raise ValueError(
                f"{PREFIX}HOST {self.host} can be reached from other machines: "
                f"set {PREFIX}API_KEY, or listen on 127.0.0.1"
            )
        if self.api_key is not None and self._is_an_admin_key(self.api_key):
            raise ValueError(
                f"{PREFIX}API_KEY is also one of {PREFIX}ADMIN_KEYS: who may ask could operate"
            )
        if self.port and self.port == self.admin_port:
            raise ValueError(
                f"{PREFIX}ADMIN_PORT is {PREFIX}PORT {self.port}: operators have a listener of "
                "their own"
            )
        return self

    def _is_an_admin_key(self, key: SecretStr) -> bool:
        admin_keys = "" if self.admin_keys is None else self.admin_keys.get_secret_value()
        return bool(admin_keys) and key.get_secret_value() in parse_admin_keys(admin_keys).values()

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def client_override_in_force(self) -> ClientOverride:
        if self.client_override is not None:
            return self.client_override
        return "any" if self.is_loopback and self.api_key is None else "none"

    @property
    def store_url(self) -> str:
        return self.store or f"sqlite:///{self.cache / 'deshift.db'}"


def parse_admin_keys(text: str) -> dict[str, str]:
    """`name:key,name:key` -> key by name. Raises ValueError, which never shows a key."""
    keys: dict[str, str] = {}
    for number, part in enumerate(text.split(","), start=1):
        name, separator, key = part.strip().partition(":")
        if not separator or not _ADMIN_NAME.fullmatch(name):
            raise ValueError(f"entry {number} is not name:key with a name of letters and digits")
        if len(key) < MIN_ADMIN_KEY_LEN or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"the key of {name!r} must be at least {MIN_ADMIN_KEY_LEN} printable ASCII "
                "characters without spaces"
            )
        if name in keys:
            raise ValueError(f"{name!r} is named twice")
        keys[name] = key
    return keys


def is_loopback(host: str) -> bool:
    """Whether a name or address, without brackets or port, is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _explain(error: ValidationError) -> str:
    """One line that names each variable; values are shown, except the key's."""
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            lines.append(message)
            continue
        name = str(problem["loc"][0])
        shown = "" if name in ("api_key", "admin_keys") else f" {problem['input']!r}"
        known = name in Settings.model_fields
        place = f"{name}{shown} ({PREFIX}{name.upper()})"
        lines.append(f"{place}: {message if known else 'not a setting'}")
    return "; ".join(lines)
