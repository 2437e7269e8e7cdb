"""The wire format of the admin API: what a change holds and what is shown.

Does not cover previews (preview.py). Nothing that could sign in is ever shown, except a new key,
once.
"""

from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field

from server.control import MAX_REASON_LEN
from server.documents import KillAction, PolicyFields
from steering.plan import Mode

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ID_PATTERN = r"^[0-9a-f]{64}$"
MAX_REVISION = 2**53  # what JSON's readers hold exactly

Name = Annotated[str, Path(pattern=NAME_PATTERN)]
NewName = Annotated[
    str,
    Field(
        pattern=NAME_PATTERN,
        description="1 to 64 letters, digits, dots, dashes or underscores, a letter or digit "
        "first.",
    ),
]
Reason = Annotated[
    str, Field(max_length=MAX_REASON_LEN, description="Why, in one line; stands in the audit.")
]
Revision = Annotated[
    int,
    Field(
        ge=0,
        le=MAX_REVISION,
        description="The revision that was seen; another one in the store is a 409. "
        "0: it did not exist.",
    ),
]
Seconds = Annotated[float, Field(gt=0, le=366 * 86400)]
ReasonQuery = Annotated[
    str, Query(max_length=MAX_REASON_LEN, description="Why, in one line; stands in the audit.")
]
RevisionQuery = Annotated[
    int | None,
    Query(ge=0, le=MAX_REVISION, description="The revision that was seen; another one is a 409."),
]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ErrorDetail(BaseModel):
    """`revision`, with code stale_revision only: what the store has now; 0: nothing."""

    message: str
    type: str
    param: str | None
    code: str | None
    revision: int | None = None


class Problem(BaseModel):
    """Every error, as on the public API."""

    error: ErrorDetail


class NewTenant(Model):
    name: NewName
    policy: PolicyFields = Field(
        default_factory=lambda: PolicyFields.model_validate({}),
        description="Fields left out have defaults.",
    )
    reason: Reason


class PolicyPut(Model):
    policy: PolicyFields = Field(description="The whole policy; fields left out have defaults.")
    revision: Revision
    reason: Reason
    expires_in_s: Seconds | None = Field(
        None,
        description="After so many seconds the last policy without an end is in force again.",
    )


class PolicyPatch(Model):
    changes: dict[str, Any] = Field(
        min_length=1, description="Only the fields to change, named as in a whole policy."
    )
    revision: Revision | None = None
    reason: Reason
    expires_in_s: Seconds | None = Field(
        None,
        description="After so many seconds the last policy without an end is in force again.",
    )


class NewKeyBody(Model):
    id: NewName
    revision: Revision | None = Field(None, description="keys_revision as it was seen.")
    reason: Reason
    expires_in_s: Seconds | None = Field(None, description="Null: good until it is revoked.")


class RotateKeyBody(Model):
    new_id: NewName
    overlap_s: float = Field(
        ge=0, le=366 * 86400, description="How long the old key is good beside the new one."
    )
    revision: Revision | None = Field(None, description="keys_revision as it was seen.")
    reason: Reason


class AliasPut(Model):
    vector: str = Field(pattern=ID_PATTERN, description="Id of a vector set in the store.")
    revision: Revision | None = None
    reason: Reason


class KillPut(Model):
    """`replica` works without the store: it holds in this process, until it is taken back or the
    process ends, and is written to its log instead of the audit."""

    action: KillAction
    scope: Literal["fleet", "replica"] = "fleet"
    revision: Revision | None = Field(None, description="Of the fleet's switch only.")
    reason: Reason


class ReasonBody(Model):
    reason: Reason


class Changed(BaseModel):
    """`revision`: of what was changed; the same as before when nothing changed."""

    revision: int


class KeyView(BaseModel):
    """A key without its digest. Times are unix seconds."""

    id: str
    created_at: float
    expires_at: float | None
    is_valid: bool


class IssuedKey(BaseModel):
    """`key` is shown this once and kept nowhere."""

    id: str
    key: str
    expires_at: float | None
    revision: int = Field(description="The new keys_revision.")


class UntilView(BaseModel):
    """At `at` (unix seconds) the policy falls back to `then` by itself."""

    at: float
    then: PolicyFields


class TenantView(BaseModel):
    """As the store has it. `in_force` is `policy`, or `until.then` when its time has come."""

    name: str
    revision: int
    created_at: float
    policy: PolicyFields
    in_force: PolicyFields
    until: UntilView | None
    keys: list[KeyView]
    keys_revision: int


class TenantPage(BaseModel):
    """`next`: pass it as `after` for the next page; null on the last one.

    `unreadable`: documents of the whole store that cannot be read, with what is wrong.
    """

    tenants: list[TenantView]
    next: str | None
    revision: int = Field(description="Of the store's newest commit.")
    unreadable: dict[str, str]


class LayerView(BaseModel):
    """norm: |Delta_l|; relative_norm: the same over the median |h_l|; consistency: mean pairwise
    cosine of the prompts' shifts."""

    layer: int
    norm: float
    relative_norm: float
    consistency: float


class VectorView(BaseModel):
    """`layers` is null where the set cannot be read; `problem` says why."""

    id: str
    created_at: str
    size_bytes: int
    aliases: list[str]
    manifest: dict[str, Any]
    layers: list[LayerView] | None
    problem: str | None


class VectorList(BaseModel):
    vectors: list[VectorView]


class AliasView(BaseModel):
    name: str
    vector: str
    revision: int


class AliasList(BaseModel):
    aliases: list[AliasView]


class FleetKill(BaseModel):
    action: KillAction
    revision: int


class KillView(BaseModel):
    """`fleet` is null when the store does not answer; `problem` says so.

    `replica`: this process's own switch.
    """

    fleet: FleetKill | None
    replica: KillAction
    problem: str | None = None


class ChangeView(BaseModel):
    """A document before and after; null: it did not exist. Digests of keys are left out."""

    document: str
    before: Any
    after: Any


class AuditView(BaseModel):
    """at: unix seconds, the store's."""

    revision: int
    at: float
    by: str
    via: str
    reason: str
    action: str
    changes: list[ChangeView]


class AuditPage(BaseModel):
    """`next`: pass it as `before` for older changes; null when there are none."""

    entries: list[AuditView]
    next: int | None


class ReplicaView(BaseModel):
    """`status` is what the replica says of itself; null where that cannot be read.

    `behind`: it has not seen the store's newest revision; null where it does not say.
    """

    name: str
    revision: int | None
    behind: bool | None
    status: dict[str, Any] | None


class ReplicaList(BaseModel):
    replicas: list[ReplicaView]
    revision: int = Field(description="Of the store's newest commit.")


class StoreView(BaseModel):
    """How this replica stands to the store; `foreign`: it holds other data than are in force.

    revision, epoch: of the documents in force here. age_s: seconds since the store confirmed them;
    null before it ever has.
    """

    state: Literal["ok", "unreachable", "foreign"]
    problem: str | None
    revision: int
    epoch: str
    age_s: float | None


class InForceView(BaseModel):
    """What a request of this tenant with a picture gets from this replica now.

    revision: of the policy, 0: of the server's settings; store_revision: the newest commit that
    this replica has taken up. kill: the stricter of the fleet's switch and this replica's own; it
    goes before mode and alpha. problem: what keeps pictures from being steered so, the vectors or
    the dose. store, age_s: as in the store's own view.
    """

    tenant: str
    mode: Mode
    alpha: float
    schedule: str
    vector_alias: str
    vector: str | None
    rollout: float
    revision: int
    store_revision: int
    kill: KillAction
    store: Literal["ok", "unreachable", "foreign"]
    age_s: float | None
    problem: str | None
