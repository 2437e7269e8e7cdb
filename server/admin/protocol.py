"""What the admin API answers.

Does not cover what it is asked (changes.py) nor previews (preview.py). Nothing that could sign in
is ever shown, except a new key, once.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from server.documents import KillAction, PolicyFields
from steering.plan import Mode


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

    revision: of the policy, 0: of the server's settings; applied_at: when this replica put it in
    force, unix seconds by its own clock, None for the settings'; store_revision: the newest commit
    that this replica has taken up. kill: the stricter of the fleet's switch and this replica's own;
    it goes before mode and alpha. problem: what keeps pictures from being steered so, the vectors
    or the dose. store, age_s: as in the store's own view.
    """

    tenant: str
    mode: Mode
    alpha: float
    schedule: str
    vector_alias: str
    vector: str | None
    rollout: float
    revision: int
    applied_at: float | None
    store_revision: int
    kill: KillAction
    store: Literal["ok", "unreachable", "foreign"]
    age_s: float | None
    problem: str | None
