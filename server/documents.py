"""What the store's documents say: tenants and their policies, their keys, aliases, the kill switch.

Text from a store comes from outside, so it is validated here, and in the same models as what an
operator writes. Does not read or write a store (control.py, sync.py) nor decide about requests
(policy.py).
"""

import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from server.config import ClientOverride, GateText, ScheduleText
from server.engine.types import OnError
from server.errors import DocumentError
from steering.corruption import Corruption
from steering.errors import PlanError
from steering.plan import Method, Mode, Schedule, Scope, check_method
from steering.stores.base import ALIAS_PREFIX

TENANT_PREFIX = "tenant/"
KEYS_PREFIX = "keys/"
KILL_KEY = "kill"
DEFAULT_TENANT = "default"  # of requests without a tenant's key
KillAction = Literal["none", "unsteered", "reject"]

# No control characters, no separators: names stand in headers, logs, labels, cache keys and URLs.
NAME_FORM = "1 to 64 letters, digits, dots, dashes or underscores, a letter or digit first"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> str:
    """Of a tenant, a key or an alias. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is not a name: {NAME_FORM}")
    return name


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )


class PolicyFields(_Model):
    """A tenant's policy, as an operator writes it; server/policy.py says what each field does.

    requests_per_minute, concurrency: of one replica; None: no limit. rollout: per cent of users.
    """

    mode: Mode = "dataset"
    method: Method = "subtract"
    alpha: float = Field(1.0, ge=0)
    alpha_max: float = Field(2.0, ge=0)
    schedule: ScheduleText = "all"
    gate: GateText = "none"
    scope: Scope = "last"
    vector_alias: str = "default"
    corruption: Corruption = "blank"
    on_error: OnError = "reject"
    client_override: ClientOverride = "none"
    max_relative_dose: float = Field(1.0, gt=0)
    rollout: float = Field(100.0, ge=0, le=100)
    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | None = None

    @field_validator("vector_alias")
    @classmethod
    def _valid_alias(cls, name: str) -> str:
        return check_name(name)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.alpha > self.alpha_max:
            raise ValueError(f"alpha {self.alpha:g} is over alpha_max {self.alpha_max:g}")
        try:
            check_method(self.mode, self.method, self.alpha, Schedule.parse(self.schedule))
        except PlanError as error:
            raise ValueError(str(error)) from None
        return self


class Until(_Model):
    """At `at` (unix seconds) the policy falls back to `then` by itself."""

    at: float
    then: PolicyFields


class TenantDocument(_Model):
    """Document tenant/<name>. Its revision is the policy's revision."""

    policy: PolicyFields
    until: Until | None = None
    created_at: float = 0.0

    def in_force(self, now: float) -> PolicyFields:
        return self.until.then if self.until is not None and now >= self.until.at else self.policy


class KeyRecord(_Model):
    """An API key: the sha256 of it in hex, never the key. expires_at: unix seconds.

    is_revoked: good for nothing, whatever a replica's clock says beside that of the operator's.
    """

    id: str
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    created_at: float
    expires_at: float | None = None
    is_revoked: bool = False

    @field_validator("id")
    @classmethod
    def _valid_id(cls, name: str) -> str:
        return check_name(name)

    def is_valid(self, now: float) -> bool:
        return not self.is_revoked and (self.expires_at is None or now < self.expires_at)


class KeysDocument(_Model):
    """Document keys/<tenant>."""

    keys: tuple[KeyRecord, ...] = ()


class KillDocument(_Model):
    """Document kill: `unsteered` steers nobody, `reject` refuses every request with a picture."""

    action: KillAction = "none"


class AliasDocument(_Model):
    """Document alias/<name>."""

    vector: str = Field(pattern=r"^[0-9a-f]{64}$")


AnyDocument = TenantDocument | KeysDocument | KillDocument | AliasDocument
D = TypeVar("D", bound=_Model)


def parse(kind: type[D], key: str, value: str) -> D:
    """Raises DocumentError, naming the document and what is wrong with it."""
    try:
        return kind.model_validate_json(value)
    except ValidationError as error:
        raise DocumentError(f"the document {key!r} cannot be read: {explain(error)}") from None


def kind_of(key: str) -> tuple[type[AnyDocument], str] | None:
    """What a key's document is, and the name in it; None for a key of a later version."""
    if key == KILL_KEY:
        return KillDocument, ""
    for prefix, kind in _KINDS.items():
        if key.startswith(prefix):
            return kind, key.removeprefix(prefix)
    return None


_KINDS: dict[str, type[AnyDocument]] = {
    TENANT_PREFIX: TenantDocument,
    KEYS_PREFIX: KeysDocument,
    ALIAS_PREFIX: AliasDocument,
}


def text_of(document: AnyDocument) -> str:
    return document.model_dump_json()


def plain(value: str | None) -> Any:
    """A document's text as plain JSON values, for audit and display; None stays None."""
    return None if value is None else json.loads(value)


def explain(error: ValidationError) -> str:
    """One line: each field with what is wrong with it."""
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        place = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{place}: {message}" if place else message)
    return "; ".join(lines)
