"""The page of a tenant: what is asked, what is in force, the form, its keys, preview and history.

With a stale form it also says what was changed meanwhile, and merges both.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from server.admin.protocol import LayerView
from server.admin.shelf import VectorShelf
from server.console.diffs import ReadableEntry, readable
from server.console.fleet import read_fleet, tenant_row, with_ages
from server.console.forms import Merge, TypedPolicy, field_groups, merge, values_of
from server.console.pages import render
from server.control import AuditEntry, DocumentChange
from server.documents import NAME_FORM, TENANT_PREFIX, PolicyFields, TenantDocument
from server.services import services_of

HISTORY_SIZE = 10
MEANWHILE_SIZE = 50  # changes that a stale form is told of
HOUR, DAY = 3600, 86400
PERMANENT = "permanent"
DURATIONS = (
    (PERMANENT, "until changed"),
    (str(HOUR // 4), "15 minutes"),
    (str(HOUR // 2), "30 minutes"),
    (str(HOUR), "1 hour"),
    (str(4 * HOUR), "4 hours"),
    (str(DAY), "1 day"),
    (str(7 * DAY), "7 days"),
)
KEY_DURATIONS = (
    ("", "no end"),
    (str(DAY), "1 day"),
    (str(30 * DAY), "30 days"),
    (str(90 * DAY), "90 days"),
    (str(365 * DAY), "1 year"),
)
OVERLAPS = (
    (str(DAY), "1 day"),
    (str(HOUR), "1 hour"),
    (str(7 * DAY), "7 days"),
    ("0", "not at all"),
)


@dataclass(frozen=True)
class Conflict:
    """A stale policy form: what it saw, what was committed since, and what becomes of it."""

    seen: int
    entries: Sequence[ReadableEntry]
    merge: Merge


@dataclass(frozen=True)
class Asked:
    """The preview's form."""

    question: str
    alpha_a: str
    alpha_b: str


@dataclass(frozen=True)
class Answer:
    alpha: float
    text: str
    about: str


async def tenant_page(request: Request, name: str, status: int = 200, **values: Any) -> Response:
    """Raises NoSuchTenantError, StoreError."""
    control, now = services_of(request).control, time.time()
    tenant = await control.tenant(name)
    state, fleet = await read_fleet(control)
    (row,) = await with_ages(control, [tenant_row(tenant, state, fleet.replicas, now)])
    policy = tenant.document.in_force(now)
    is_temporary = tenant.document.until is not None and now < tenant.document.until.at
    entries = await control.audit(HISTORY_SIZE, tenant=name)
    defaults: dict[str, Any] = {
        "row": row,
        "then": tenant.document.until.then if tenant.document.until else None,
        "in_force": policy,
        "groups": field_groups(),
        "values": values_of(policy),
        "errors": {},
        "form_revision": tenant.revision,
        "typed_reason": "",
        # While a temporary policy runs, saving must not make all of it permanent unasked.
        "lasts": "" if is_temporary else PERMANENT,
        "durations": (("", "choose"), *DURATIONS) if is_temporary else DURATIONS,
        "key_durations": KEY_DURATIONS,
        "overlaps": OVERLAPS,
        "conflict": None,
        "new_key": None,
        "asked": Asked("", "0", values_of(policy)["alpha"]),
        "answers": [],
        "preview_error": "",
        "aliases": sorted(state.aliases),
        "peak": await _peak(request, state.aliases.get(policy.vector_alias)),
        "history": [readable(entry) for entry in entries],
        "name_form": NAME_FORM,
        "section": "Fleet",
        "now": now,
    }
    return render(request, "tenant.html", status, tenant=tenant, **(defaults | values))


async def _peak(request: Request, vector_id: str | None) -> LayerView | None:
    """The layer that the set under the tenant's alias moves most, relative to its state."""
    shelf: VectorShelf = request.app.state.shelf
    layers = [each.layers for each in await shelf.views() if each.id == vector_id]
    if not layers or not layers[0]:
        return None
    return max(layers[0], key=lambda each: each.relative_norm)


async def conflict_page(
    request: Request, name: str, seen: int, typed: TypedPolicy, kept: dict[str, Any]
) -> Response:
    control = services_of(request).control
    now = time.time()
    held = await control.tenant(name)
    since = [
        entry
        for entry in await control.audit(MEANWHILE_SIZE, tenant=name)
        if entry.revision > seen and _policy_change(entry, name) is not None
    ]
    merged = merge(typed.values, _seen_policy(since, name, now), held.document.in_force(now))
    conflict = Conflict(seen, [readable(entry) for entry in since], merged)
    kept |= {"values": merged.values, "form_revision": held.revision}
    return await tenant_page(request, name, 409, conflict=conflict, **kept)


def _seen_policy(since: Sequence[AuditEntry], name: str, now: float) -> PolicyFields | None:
    """What was stored before the oldest of these changes; None where that cannot be told."""
    before = _policy_change(since[-1], name) if since else None
    if before is None or before.before is None or len(since) == MEANWHILE_SIZE:
        return None
    try:
        return TenantDocument.model_validate(before.before).in_force(now)
    except ValidationError:
        return None


def _policy_change(entry: AuditEntry, name: str) -> DocumentChange | None:
    return next((each for each in entry.changes if each.key == TENANT_PREFIX + name), None)
