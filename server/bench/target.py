"""What is measured: a URL, the way its server is asked for a fixed number of tokens, extras."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

DIALECTS = ("ignore_eos", "generation_config", "usage", "bare")


class BenchError(Exception):
    """A target cannot be measured; the message is for the person at the terminal."""


@dataclass(frozen=True)
class Target:
    """One column of the comparison. `url` ends before `/v1`; `extra` joins every request body.

    `dialect` is how this server is made to produce exactly `max_tokens` tokens: `ignore_eos`
    (vLLM, Deshift), `generation_config` (transformers serve), or not at all: `usage` asks for
    the token count in the stream, `bare` for nothing beyond plain OpenAI.
    """

    name: str
    url: str
    model: str = ""
    api_key: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    dialect: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, image_url: str, question: str, max_tokens: int) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": image_url}},
            {"type": "text", "text": question},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
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


async def resolved(client: httpx.AsyncClient, target: Target, image_url: str) -> Target:
    """Fill in the model's name and the dialect by asking the server.

    Raises BenchError with the server's own words when it takes none of the dialects.
    """
    if not target.model:
        target = replace(target, model=await _first_model(client, target))
    refusals = []
    for dialect in [target.dialect] if target.dialect else DIALECTS:
        asked = replace(target, dialect=dialect)
        response = await client.post(
            f"{target.url}/v1/chat/completions",
            json=asked.body(image_url, "What is in this picture?", 2),
            headers=target.headers,
        )
        if response.status_code == 200:
            return asked
        refusals.append(f"{dialect}: {response.status_code} {response.text[:300]}")
        if response.status_code not in (400, 422):
            break
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
