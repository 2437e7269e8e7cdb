"""Tenants and their policies."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError

from server.admin.changes import Name, NewTenant, PolicyPatch, PolicyPut, ReasonQuery, RevisionQuery
from server.admin.guards import CurrentOperator, author
from server.admin.protocol import Changed, TenantPage, TenantView
from server.admin.show import tenant_view
from server.documents import PolicyFields, explain
from server.errors import InvalidRequestError
from server.services import services_of

router = APIRouter(tags=["tenants"])
MAX_PAGE = 1000


@router.get("/tenants")
async def list_tenants(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    after: Annotated[str, Query(max_length=64, description="The last name seen.")] = "",
) -> TenantPage:
    """By name."""
    state = await services_of(request).control.state()
    names = sorted(name for name in state.tenants if name > after)
    page = names[:limit]
    now = time.time()
    return TenantPage(
        tenants=[tenant_view(state.tenants[name], now) for name in page],
        next=page[-1] if len(names) > limit else None,
        revision=state.revision,
        unreadable=dict(state.unreadable),
    )


@router.post("/tenants", status_code=201)
async def create_tenant(request: Request, operator: CurrentOperator, body: NewTenant) -> Changed:
    """A name that is taken is a 409."""
    control = services_of(request).control
    written = author(operator, body.reason)
    return Changed(revision=await control.create_tenant(body.name, body.policy, written))


@router.get("/tenants/{name}")
async def show_tenant(request: Request, name: Name) -> TenantView:
    return tenant_view(await services_of(request).control.tenant(name), time.time())


@router.delete("/tenants/{name}")
async def delete_tenant(
    request: Request,
    operator: CurrentOperator,
    name: Name,
    reason: ReasonQuery,
    revision: RevisionQuery = None,
) -> Changed:
    """With its keys; can be reverted."""
    control = services_of(request).control
    written = author(operator, reason)
    return Changed(revision=await control.delete_tenant(name, revision, written))


@router.put("/tenants/{name}/policy")
async def put_policy(
    request: Request, operator: CurrentOperator, name: Name, body: PolicyPut
) -> Changed:
    """The whole policy. What is in force already is no change and leaves no trace."""
    control = services_of(request).control
    revision = await control.set_policy(
        name, body.policy, body.revision, author(operator, body.reason), body.expires_in_s
    )
    return Changed(revision=revision)


@router.patch("/tenants/{name}/policy")
async def patch_policy(
    request: Request, operator: CurrentOperator, name: Name, body: PolicyPatch
) -> Changed:
    """Some fields of the policy; the others stay what they are, also when somebody else changes
    them at the same time: that is a 409."""
    control = services_of(request).control
    written = author(operator, body.reason)
    held = await control.tenant(name)
    until = held.document.until
    if body.expires_in_s is None and until is not None and time.time() < until.at:
        raise InvalidRequestError(
            f"the policy of {name!r} is a temporary one: a change of some fields would make all "
            "of it permanent. Say expires_in_s, or PUT the whole policy",
            param="changes",
        )
    policy = _changed(held.document.in_force(time.time()), body.changes)
    expected = held.revision if body.revision is None else body.revision
    revision = await control.set_policy(name, policy, expected, written, body.expires_in_s)
    return Changed(revision=revision)


def _changed(policy: PolicyFields, changes: dict[str, Any]) -> PolicyFields:
    try:
        return PolicyFields.model_validate(policy.model_dump() | changes)
    except ValidationError as error:
        raise InvalidRequestError(f"changes: {explain(error)}", param="changes") from None
