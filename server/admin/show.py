"""What the store has -> what operators are shown, on the wire and on pages. Pure."""

import json
from collections.abc import Mapping
from typing import Any

from server.admin.protocol import (
    AuditView,
    ChangeView,
    KeyView,
    LayerView,
    ReplicaView,
    TenantView,
    UntilView,
)
from server.control import AuditEntry, TenantState
from server.documents import KEYS_PREFIX
from steering.vectors import ShiftVectors


def tenant_view(tenant: TenantState, now: float) -> TenantView:
    """now: unix seconds."""
    document = tenant.document
    until = document.until
    return TenantView(
        name=tenant.name,
        revision=tenant.revision,
        created_at=document.created_at,
        policy=document.policy,
        in_force=document.in_force(now),
        until=None if until is None else UntilView(at=until.at, then=until.then),
        keys=[
            KeyView(
                id=key.id,
                created_at=key.created_at,
                expires_at=key.expires_at,
                is_valid=key.is_valid(now),
            )
            for key in tenant.keys
        ],
        keys_revision=tenant.keys_revision,
    )


def audit_view(entry: AuditEntry) -> AuditView:
    return AuditView(
        revision=entry.revision,
        at=entry.at,
        by=entry.by,
        via=entry.via,
        reason=entry.reason,
        action=entry.action,
        changes=[
            ChangeView(
                document=change.key,
                before=_without_digests(change.key, change.before),
                after=_without_digests(change.key, change.after),
            )
            for change in entry.changes
        ],
    )


def _without_digests(key: str, value: Any) -> Any:
    """By what is kept, not by what is dropped: a record of another version shows nothing new."""
    if value is None or not key.startswith(KEYS_PREFIX):
        return value
    shown = ("id", "created_at", "expires_at")
    keys = value.get("keys", []) if isinstance(value, dict) else []
    return {"keys": [{name: each.get(name) for name in shown} for each in keys]}


def layer_views(vectors: ShiftVectors) -> list[LayerView]:
    norms = vectors.mean.norm(dim=1)  # (L,)
    columns = (norms, norms / vectors.hidden_norm, vectors.consistency)
    return [
        LayerView(layer=layer, norm=norm, relative_norm=relative, consistency=consistency)
        for layer, (norm, relative, consistency) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        )
    ]


def replica_views(statuses: Mapping[str, str], revision: int) -> list[ReplicaView]:
    """statuses: heartbeats by replica's name; revision: of the store's newest commit."""
    return [_replica_view(name, statuses[name], revision) for name in sorted(statuses)]


def _replica_view(name: str, text: str, revision: int) -> ReplicaView:
    try:
        status = json.loads(text)
    except ValueError:
        status = None
    if not isinstance(status, dict):
        return ReplicaView(name=name, revision=None, behind=None, status=None)
    seen = status.get("revision")
    if not isinstance(seen, int):
        return ReplicaView(name=name, revision=None, behind=None, status=status)
    return ReplicaView(name=name, revision=seen, behind=seen < revision, status=status)
