"""Every field of a policy as an option of a command, made from the fields themselves."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import ValidationError

from server.documents import PolicyFields, explain
from server.errors import InvalidRequestError

_HELP = {
    "mode": "dataset steers by a stored vector set, sample by each request's own shift.",
    "method": "subtract the shift, safety-projected (its part along the refusal direction), or "
    "project (the state's own part in the shifts' subspace).",
    "alpha": "Strength; 0 is an exact no-op.",
    "alpha_max": "Largest alpha that any request may get.",
    "schedule": "all, incremental, range:a-b, single:l or incremental:a-b.",
    "gate": "none, or layer:threshold:temperature: alpha is the most that a prompt gets.",
    "scope": "Which prompt positions are steered, besides every generated one.",
    "vector_alias": "The vector set of mode dataset.",
    "corruption": "What mode sample replaces pictures by to measure their shift.",
    "on_error": "What happens to requests that are to be steered and cannot be.",
    "client_override": "How far a request may depart from the policy.",
    "max_relative_dose": "Cap of alpha * |Delta| / |h| at every layer.",
    "rollout": "Per cent of users that are steered, always the same ones.",
    "requests_per_minute": "Limit of each replica, or none.",
    "concurrency": "Requests at once on each replica, or none for no limit.",
}


def with_policy_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every field of PolicyFields to a command.

    The command gets those that were given as `given`, a dictionary of their texts by field. They
    are texts because PolicyFields checks them, wherever they come from.
    """

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        texts = {name: arguments.pop(name) for name in PolicyFields.model_fields}
        given = {name: text for name, text in texts.items() if text is not None}
        command(**arguments, given=given)

    own = [each for each in inspect.signature(command).parameters.values() if each.name != "given"]
    fields = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None, typer.Option(option_of(name), help=_HELP[name], metavar=_metavar(name))
            ],
        )
        for name in PolicyFields.model_fields
    ]
    keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    run.__signature__ = inspect.Signature([*keyword_only, *fields])  # type: ignore[attr-defined]
    return run


def option_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def fields_in(file: Path) -> dict[str, Any]:
    """The fields of a policy that a JSON file holds, alone or as `policy` beside their evidence.

    Whether they are fields and make sense is for `changed` to say. Raises InvalidRequestError.
    """
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{file}: not a JSON file ({error})") from None
    if isinstance(values, dict) and "policy" in values:
        values = values["policy"]
    if not isinstance(values, dict):
        raise InvalidRequestError(f"{file}: no JSON object with fields of a policy")
    return values


def changed(policy: PolicyFields, given: Mapping[str, Any]) -> PolicyFields:
    """The policy with these fields instead; their values are texts or JSON's.

    Raises InvalidRequestError, in one line.
    """
    values = {
        name: None if text == "none" and _may_be_none(name) else text
        for name, text in given.items()
    }
    try:
        return PolicyFields.model_validate({**policy.model_dump(), **values})
    except ValidationError as error:
        raise InvalidRequestError(explain(error)) from None


def _may_be_none(field: str) -> bool:
    return type(None) in get_args(PolicyFields.model_fields[field].annotation)


def _metavar(field: str) -> str:
    annotation = PolicyFields.model_fields[field].annotation
    choices = [each for each in get_args(annotation) if isinstance(each, str)]
    if choices:
        return "|".join(choices)
    if _may_be_none(field):
        return "N|none"
    return "NUMBER" if annotation is float else "TEXT"
