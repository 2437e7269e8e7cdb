"""What this replica does for a tenant at this moment, whatever the store says by now."""

import time

from fastapi import APIRouter, Request

from server.admin.changes import Name
from server.admin.protocol import InForceView
from server.errors import AuthenticationError, NoSuchTenantError
from server.services import Services, services_of

router = APIRouter(tags=["tenants"])


@router.get("/tenants/{name}/in-force")
async def show_in_force(request: Request, name: Name) -> InForceView:
    """Read from this replica's memory; answers without the store, too."""
    return in_force_view(services_of(request), name)


def in_force_view(services: Services, tenant: str) -> InForceView:
    """Raises NoSuchTenantError, and UnavailableError where the policy could never be read."""
    try:
        policy = services.directory.policy(tenant, time.time())
    except AuthenticationError:
        raise NoSuchTenantError(f"this replica knows no tenant {tenant!r}") from None
    uses_vectors = policy.is_active and policy.mode == "dataset"
    vectors = services.vectors.active(policy.vector_alias) if uses_vectors else None
    status = services.sync.status
    return InForceView(
        tenant=tenant,
        mode=policy.mode if policy.is_active else "off",
        alpha=policy.alpha if policy.is_active else 0.0,
        schedule=str(policy.schedule),
        vector_alias=policy.vector_alias,
        vector=None if vectors is None else vectors.id,
        rollout=policy.rollout,
        revision=policy.revision,
        applied_at=services.directory.applied_at(tenant),
        store_revision=services.directory.revision,
        kill=services.directory.kill,
        store=status.store,
        age_s=status.age_s,
        problem=services.vectors.problem_of(policy),
    )
