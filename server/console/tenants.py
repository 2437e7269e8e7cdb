"""What an operator does with a tenant: its policy, keys, preview; make one, delete one.

A policy form that is not accepted comes back with everything that was typed. Does not cover what
the page shows (tenant_page.py).
"""

import base64
from collections.abc import Mapping, Sequence

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from server.admin.auth import operator_of
from server.admin.preview import PreviewAnswer, PreviewBody, PreviewDesk
from server.console.forms import TypedPolicy, field_groups, read_policy, values_of
from server.console.pages import Change, ConsolePage, done, read_change, render, tenant_path
from server.console.tenant_page import (
    DURATIONS,
    KEY_DURATIONS,
    OVERLAPS,
    PERMANENT,
    Answer,
    Asked,
    conflict_page,
    tenant_page,
)
from server.documents import NAME_FORM, explain
from server.engine.types import EngineError
from server.errors import (
    ExistsError,
    InvalidRequestError,
    NoSuchTenantError,
    ServerError,
    error_status,
)
from server.policy import default_fields
from server.services import services_of
from steering.errors import ConflictError

router = APIRouter(route_class=ConsolePage, include_in_schema=False)


@router.get("/new-tenant")
async def new_tenant(request: Request) -> Response:
    operator_of(request)
    typed = TypedPolicy(values_of(default_fields(services_of(request).settings)), None, {})
    return await _new_tenant_page(request, 200, typed)


@router.post("/new-tenant")
async def create(request: Request) -> Response:
    change = await read_change(request)
    typed = read_policy(change.fields)
    if typed.policy is None:
        return await _new_tenant_page(request, 400, typed, typed.errors, change)
    name = change.text("name")
    control = services_of(request).control
    try:
        revision = await control.create_tenant(name, typed.policy, change.author)
    except (InvalidRequestError, ExistsError) as error:
        is_name = isinstance(error, ExistsError) or error.param == "tenant"
        errors = {"name" if is_name else "reason": str(error)}
        return await _new_tenant_page(request, error_status(error), typed, errors, change)
    return done(tenant_path(name), "created", revision)


async def _new_tenant_page(
    request: Request,
    status: int,
    typed: TypedPolicy,
    errors: Mapping[str, str] | None = None,
    change: Change | None = None,
) -> Response:
    errors = errors or {}
    state = await services_of(request).control.state()
    return render(
        request,
        "new_tenant.html",
        status,
        section="Fleet",
        name=change.text("name") if change else "",
        typed_reason=change.text("reason") if change else "",
        groups=field_groups(),
        values=typed.values,
        errors=errors,
        aliases=sorted(state.aliases),
        name_form=NAME_FORM,
        error="; ".join(errors.values()),
    )


@router.get("/tenants/{name}")
async def show(request: Request, name: str) -> Response:
    operator_of(request)
    return await tenant_page(request, name)


@router.post("/tenants/{name}/policy")
async def set_policy(request: Request, name: str) -> Response:
    change = await read_change(request)
    seen, typed = change.number("revision"), read_policy(change.fields)
    kept = {
        "values": typed.values,
        "typed_reason": change.text("reason"),
        "lasts": change.text("lasts"),
        "form_revision": seen,  # still the old one: what is wrong here does not hide that
    }
    if typed.policy is None:
        told = "Not saved: some fields are not right."
        return await tenant_page(request, name, 400, error=told, errors=typed.errors, **kept)
    control = services_of(request).control
    try:
        lasts = _choice(change.text("lasts"), DURATIONS, "lasts")
        revision = await control.set_policy(name, typed.policy, seen, change.author, lasts)
    except ConflictError:
        return await conflict_page(request, name, seen, typed, kept)
    except InvalidRequestError as error:
        return await tenant_page(request, name, 400, error=f"Not saved: {error}", **kept)
    if revision == seen:
        return done(tenant_path(name), "same")
    return done(tenant_path(name), "policy", revision)


@router.post("/tenants/{name}/delete")
async def delete(request: Request, name: str) -> Response:
    change = await read_change(request)
    control = services_of(request).control
    try:
        revision = await control.delete_tenant(name, change.number("revision"), change.author)
    except (InvalidRequestError, ConflictError) as error:
        return await tenant_page(request, name, error_status(error), error=f"Not deleted: {error}")
    return done("/", "deleted", revision)


@router.post("/tenants/{name}/keys")
async def create_key(request: Request, name: str) -> Response:
    change = await read_change(request)
    control = services_of(request).control
    try:
        lasts = _choice(change.text("lasts"), KEY_DURATIONS, "lasts")
        made = await control.create_key(
            name, change.text("id"), change.author, lasts, change.number("keys_revision")
        )
    except (InvalidRequestError, ExistsError, ConflictError) as error:
        return await tenant_page(request, name, error_status(error), error=f"No key made: {error}")
    return await tenant_page(request, name, new_key=made)


@router.post("/tenants/{name}/keys/{key_id}/rotate")
async def rotate_key(request: Request, name: str, key_id: str) -> Response:
    change = await read_change(request)
    control = services_of(request).control
    try:
        overlap_s = _choice(change.text("overlap"), OVERLAPS, "overlap") or 0.0
        seen = change.number("keys_revision")
        made = await control.rotate_key(
            name, key_id, change.text("new_id"), change.author, overlap_s, seen
        )
    except (InvalidRequestError, ExistsError, ConflictError) as error:
        return await tenant_page(request, name, error_status(error), error=f"Not rotated: {error}")
    return await tenant_page(request, name, new_key=made)


@router.post("/tenants/{name}/keys/{key_id}/revoke")
async def revoke_key(request: Request, name: str, key_id: str) -> Response:
    change = await read_change(request)
    control = services_of(request).control
    try:
        seen = change.number("keys_revision")
        revision = await control.revoke_key(name, key_id, change.author, seen)
    except (InvalidRequestError, ConflictError) as error:
        return await tenant_page(request, name, error_status(error), error=f"Not revoked: {error}")
    return done(tenant_path(name), "revoked", revision)


@router.post("/tenants/{name}/preview")
async def preview(request: Request, name: str) -> Response:
    change = await read_change(request)
    asked = Asked(change.text("question"), change.text("alpha_a"), change.text("alpha_b"))
    desk: PreviewDesk = request.app.state.preview
    try:
        body = _preview_body(name, asked, change)
        found = await desk.preview(body, request.receive)
    except NoSuchTenantError:
        raise
    except (ServerError, EngineError) as error:
        return await tenant_page(
            request, name, error_status(error), asked=asked, preview_error=str(error)
        )
    answers = [Answer(each.alpha, each.text, _about(each)) for each in found.answers]
    return await tenant_page(request, name, asked=asked, answers=answers)


def _about(answer: PreviewAnswer) -> str:
    steering = answer.steering
    told = f"mode {steering.mode}, dose {steering.relative_dose:.3f}"
    if steering.reason is not None:
        told = f"not steered: {steering.reason}"
    return f"{told} · {answer.usage.completion_tokens} tokens · {answer.finish_reason}"


def _preview_body(name: str, asked: Asked, change: Change) -> PreviewBody:
    """Raises InvalidRequestError."""
    data = change.files.get("picture")
    if not data:
        raise InvalidRequestError("choose a picture", param="picture")
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": asked.question},
    ]
    try:
        return PreviewBody.model_validate(
            {
                "tenant": name,
                "messages": [{"role": "user", "content": content}],
                "alphas": [asked.alpha_a, asked.alpha_b],
            }
        )
    except ValidationError as error:
        raise InvalidRequestError(explain(error)) from None


def _choice(text: str, choices: Sequence[tuple[str, str]], name: str) -> float | None:
    """Seconds of one of the choices; None for the one without. Raises InvalidRequestError."""
    if text not in {value for value, _ in choices}:
        told = "choose for how long" if not text else f"{name} is none of the choices"
        raise InvalidRequestError(told, param=name)
    return None if text in ("", PERMANENT) else float(text)
