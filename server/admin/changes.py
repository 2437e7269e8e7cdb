"""What a request of the admin API may hold: names, revisions, reasons, and the bodies of changes.

Does not cover answers (protocol.py) nor previews (preview.py).
"""

from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field

from server.control import MAX_REASON_LEN
from server.documents import KillAction, PolicyFields

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
