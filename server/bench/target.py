"""What is measured: a URL, the way its server is asked for a fixed number of tokens, extras."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from server.bench.prompts import Message

DIALECTS = ("ignore_eos", "generation_config", "usage", "bare")


class BenchError(Exception):
    """A target cannot be measured; the message is for the person at the terminal."""


@dataclass(frozen=True)
class Target:
    """One column of the comparison. `url` ends before `/v1`; `extra` joins every request body.

    `dialect` is how this server is made to produce exactly `max_tokens` tokens: `ignore_eos`
    (vLLM, Deshift), `generation_config` (transformers serve), or not at all: `usage` asks for
    the token count in the stream, `bare` for nothing beyond plain OpenAI. `new_sizes`: every
    photograph has a size that this server has not seen. `pid`: the server's process, 0 where it
    was not started here. `max_choices`: the largest `n` that it is known to take.
    `admin_url`: of its operators' listener, "" where that is not known.
    """

    name: str
    url: str
    model: str = ""
    api_key: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    dialect: str = ""
    new_sizes: bool = False
    pid: int = 0
    max_choices: int = 1
    admin_url: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
        """A streaming chat, greedy."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self.dialect == "generation_config":
            body["generation_config"] = json.dumps(
                {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens, "do_sample": False}
            )
        if self.dialect == "ignore_eos":
            body["ignore_eos"] = True
        if self.dialect in ("ignore_eos", "usage"):
            body["stream_options"] = {"include_usage": True}
        return body | dict(self.extra)


def variants(targets: Sequence[Target], wanted: Mapping[str, str]) -> list[Target]:
    """Each target once, or once for each of its steering settings, `off,dataset,...`.

    A setting that is named twice is measured twice: the two columns' difference is the floor
    below which this machine tells nothing apart. Raises BenchError.
    """
    if unknown := wanted.keys() - {target.name for target in targets}:
        raise BenchError(f"--steering names no server: {', '.join(sorted(unknown))}")
    result: list[Target] = []
    for target in targets:
        if target.name not in wanted:
            result.append(target)
            continue
        settings = wanted[target.name].split(",")
        for index, setting in enumerate(settings):
            again = settings[:index].count(setting)
            name = f"{target.name} {setting}" + (f" ({again + 1})" if again else "")
            extra = {"steering": _override(setting)}
            cold = setting == "sample-cold"
            result.append(replace(target, name=name, extra=extra, new_sizes=cold))
    return result


def _override(setting: str) -> dict[str, Any]:
    if setting in ("off", "dataset"):
        return {"mode": setting}
    if setting in ("sample-cold", "sample-warm"):
        return {"mode": "sample"}
    try:
        return {"mode": "dataset", "alpha": float(setting)}
    except ValueError:
        raise BenchError(
            f"steering {setting!r} is not off, dataset, sample-cold, sample-warm or an alpha"
        ) from None


async def resolved(
    client: httpx.AsyncClient, target: Target, messages: Sequence[Message]
) -> Target:
    """Fill in the model's name and the dialect by asking the server with `messages`.

    Raises BenchError with the server's own words when it takes none of the dialects.
    """
    try:
        if not target.model:
            target = replace(target, model=await _first_model(client, target))
        refusals = []
        for dialect in [target.dialect] if target.dialect else DIALECTS:
            asked = replace(target, dialect=dialect)
            response = await client.post(
                f"{target.url}/v1/chat/completions",
                json=asked.body(messages, 2),
                headers=target.headers,
            )
            if response.status_code == 200:
                return asked
            refusals.append(f"{dialect}: {response.status_code} {response.text[:300]}")
            if response.status_code not in (400, 422):
                break
    except httpx.HTTPError as error:
        raise BenchError(f"{target.name} at {target.url}: {error!r}") from error
    raise BenchError(f"{target.name} at {target.url} refuses:\n" + "\n".join(refusals))


async def _first_model(client: httpx.AsyncClient, target: Target) -> str:
    response = await client.get(f"{target.url}/v1/models", headers=target.headers)
    models = response.json().get("data", []) if response.status_code == 200 else []
    if not models:
        raise BenchError(
            f"{target.name} at {target.url} lists no model ({response.status_code}); "
            f"name one: --model {target.name}=MODEL"
        )
    return str(models[0]["id"])
