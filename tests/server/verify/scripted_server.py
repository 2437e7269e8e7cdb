"""A server without a model whose log-probabilities are a function of prompt and strength, and that
can be told to have one fault at a time."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

Fault = Literal[
    "none",
    "inert",  # steering does nothing
    "leaks",  # a row takes some of its neighbours' strength
    "zero-is-something",  # alpha 0 is not off
    "dirty-cache",  # keys and values of the last strength are reused
    "lazy",  # the first request is not steered
    "noisy",  # equal requests are not answered equally
    "two-stories",  # the stream tells another revision
    "overdosed",
    "miscounts",
    "misses-hooks",
    "deaf",  # a wish to be off is taken and ignored
]
POLICY_ALPHA, ALPHA_MAX, REVISION = 0.5, 2.0, 7
DOSE_OF_ALPHA = 0.4
VOCABULARY, TOP = 30, 20
TOKEN_S = 0.001
CACHED_TOKENS = 16


class Forbidden(Exception):
    pass


@dataclass
class ScriptedServer:
    """override: how far requests are heard. counted: successes by mode, earlier ones too."""

    fault: Fault = "none"
    override: Literal["none", "strengthen", "any"] = "any"
    alpha: float = POLICY_ALPHA
    num_asked: int = 0
    counted: Counter[str] = field(default_factory=Counter)
    running: list[float] = field(default_factory=list)
    kept: dict[str, float] = field(default_factory=dict)  # of each prompt, whose KV there is

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/ready", self.ready),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )

    @property
    def admin(self) -> Starlette:
        return Starlette(routes=[Route("/metrics", self.metrics)])

    async def models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": "scripted"}]})

    async def ready(self, _: Request) -> Response:
        return JSONResponse({"status": "ready", "steering": {}, "engine": {}})

    async def metrics(self, _: Request) -> Response:
        series = {
            'deshift_engine_up{model_name="scripted"}': 1,
            'deshift_replica_info{model_name="scripted",dtype="float32"}': 1,
            'deshift_canary_passed{model_name="scripted"}': 1,
            'deshift_engine_failures_total{kind="hooks"}': int(self.fault == "misses-hooks"),
            'deshift_requests_total{mode="off",outcome="invalid"}': 3,
        }
        for mode, number in self.counted.items():
            missed = self.fault == "miscounts" and mode == "dataset"
            name = f'deshift_requests_total{{mode="{mode}",outcome="success"}}'
            series[name] = number - missed
        lines = ["# TYPE x counter", *(f"{name} {value}" for name, value in series.items())]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.num_asked += 1
        try:
            mode, alpha, reason = self.plan(body)
        except Forbidden:
            error = {"message": "not here", "code": "steering_override_forbidden"}
            return JSONResponse({"error": error}, status_code=403)
        if alpha > ALPHA_MAX:
            return JSONResponse({"error": {"message": "too much"}}, status_code=400)
        strength = await self.strength(body, mode, alpha)
        self.counted[mode] += 1
        steering = self.steering(mode, alpha, reason)
        fields = {"mode": mode, "revision": REVISION, "alpha": alpha, "reason": reason}
        header = "; ".join(
            f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in fields.items()
            if v is not None and not (k == "alpha" and mode == "off")
        )
        answer = {
            "choices": [{"logprobs": {"content": self.said(body, strength)}}],
            "steering": steering,
            "usage": {"prompt_tokens_details": {"cached_tokens": CACHED_TOKENS}},
        }
        headers = {"x-deshift-steering": header}
        if not body.get("stream"):
            return JSONResponse(answer, headers=headers)
        revision = REVISION - (self.fault == "two-stories")
        first = {"choices": answer["choices"], "steering_revision": revision}
        last = {k: v for k, v in answer.items() if k != "choices"} | {"choices": []}
        frames = [json.dumps(part) for part in (first, last | {"steering_revision": REVISION})]
        text = "".join(f"data: {frame}\n\n" for frame in [*frames, "[DONE]"])
        return Response(text, headers=headers, media_type="text/event-stream")

    def plan(self, body: Mapping[str, Any]) -> tuple[str, float, str | None]:
        wish = body.get("steering") or {}
        mode, alpha = wish.get("mode", "dataset"), float(wish.get("alpha", self.alpha))
        stronger = mode == "dataset" and alpha >= self.alpha
        if (mode, alpha) != ("dataset", self.alpha) and (
            self.override == "none" or (self.override == "strengthen" and not stronger)
        ):
            raise Forbidden
        if mode == "off" and self.fault != "deaf":
            return "off", 0.0, "disabled"
        if alpha == 0:
            return "off", 0.0, "alpha-zero"
        if not has_picture(body):
            return "off", 0.0, "text-only"
        return ("dataset" if mode == "off" else mode), alpha, None

    async def strength(self, body: Mapping[str, Any], mode: str, alpha: float) -> float:
        """What is really subtracted."""
        strength = 0.8 * alpha if mode == "sample" else alpha
        asked = (body.get("steering") or {}).get("alpha")
        if self.fault == "inert" or (self.fault == "lazy" and self.num_asked == 1):
            strength = 0.0
        if self.fault == "zero-is-something" and asked == 0:
            strength = 0.05
        self.running.append(strength)
        await asyncio.sleep(TOKEN_S * body["max_tokens"])
        beside = max(self.running)
        self.running.remove(strength)
        if self.fault == "leaks":
            strength += 0.1 * (beside - strength)
        if self.fault == "noisy":
            strength += random.random()
        prompt = digest(body)
        if self.fault == "dirty-cache":
            own, strength = strength, strength + 0.1 * self.kept.get(prompt, strength)
            self.kept[prompt] = own
        return strength

    def steering(self, mode: str, alpha: float, reason: str | None) -> dict[str, Any]:
        dose = DOSE_OF_ALPHA * alpha * (10 if self.fault == "overdosed" else 1)
        return {
            "mode": mode,
            "alpha": alpha,
            "revision": REVISION,
            "reason": reason,
            "relative_dose": dose,
            "gate_opening": None,
        }

    def said(self, body: Mapping[str, Any], strength: float) -> list[dict[str, Any]]:
        """Each token's log-probability falls or rises in proportion to the strength."""
        tokens = []
        for place in range(body["max_tokens"]):
            rng = random.Random(f"{digest(body)} {place}")
            scores = [rng.uniform(-5, 0) + strength * rng.uniform(-1, 1) for _ in range(VOCABULARY)]
            order = sorted(range(VOCABULARY), key=lambda token: -scores[token])[:TOP]
            tops = [{"bytes": [token], "logprob": scores[token]} for token in order]
            tokens.append(tops[0] | {"top_logprobs": tops})
        return tokens


def digest(body: Mapping[str, Any]) -> str:
    return json.dumps(body["messages"], sort_keys=True)


def has_picture(body: Mapping[str, Any]) -> bool:
    return "image_url" in digest(body)
