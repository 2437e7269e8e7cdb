"""A language model as a judge, behind any OpenAI-compatible endpoint.

Asks and remembers; knows no question and reads no verdict (harm.py, utility.py). What was said is
kept in a file by the digest of what was asked, so that a run that goes on asks nothing twice.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from steering.errors import EvaluationError
from steering.evaluate.adapters.rows import read_jsonl, read_text

MAX_TOKENS = 24
_PASSING = frozenset({408, 409, 429, 500, 502, 503, 504})


class _Passing(Exception):
    """A failure that may be over in a moment."""


@dataclass(frozen=True)
class Endpoint:
    """url: up to and with `/v1`. num_attempts: for one question; longest_wait_s: between two."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    timeout_s: float = 60.0
    num_attempts: int = 5
    longest_wait_s: float = 20.0

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query:
            raise EvaluationError(
                "the judge's address must be http(s)://HOST[:PORT]/v1, without credentials in it"
            )
        if not self.model:
            raise EvaluationError("the judge's model has no name")


class Memory:
    """What judges have said, in one file. A torn last line is forgotten."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._said: dict[str, str] = {}
        if path.exists():
            whole = read_text(path).rpartition("\n")[0]
            path.write_text(whole + "\n" if whole else "", "utf-8")
            for row in read_jsonl(path):
                self._said[row.text("digest")] = row.text("said")

    def get(self, digest: str) -> str | None:
        return self._said.get(digest)

    def keep(self, digest: str, said: str) -> None:
        self._said[digest] = said
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"digest": digest, "said": said}) + "\n")


async def ask_all(
    endpoint: Endpoint,
    questions: list[str],
    is_verdict: Callable[[str], bool],
    memory: Memory,
    done: Callable[[], None] = lambda: None,
) -> list[str]:
    """What the judge says to each question, in order; asks each different question once.

    Remembers what `is_verdict` accepts; anything else is asked again another time. `done` is
    called for every different question. Raises EvaluationError where the endpoint does not answer
    or refuses; what was said until then is remembered.
    """
    digests = [_digest(endpoint, question) for question in questions]
    said: dict[str, str] = {}
    waiting = iter(dict(zip(digests, questions, strict=True)).items())

    async def work(client: httpx.AsyncClient) -> None:
        for digest, question in waiting:
            known = memory.get(digest)
            said[digest] = await _ask(client, endpoint, question) if known is None else known
            if known is None and is_verdict(said[digest]):
                memory.keep(digest, said[digest])
            done()

    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    async with httpx.AsyncClient(headers=headers, timeout=endpoint.timeout_s) as client:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(endpoint.concurrency):
                    group.create_task(work(client))
        except* EvaluationError as problems:
            first = problems.exceptions[0]
        else:
            return [said[digest] for digest in digests]
    raise first


async def _ask(client: httpx.AsyncClient, endpoint: Endpoint, question: str) -> str:
    attempts = AsyncRetrying(
        retry=retry_if_exception_type(_Passing),
        stop=stop_after_attempt(endpoint.num_attempts),
        wait=wait_random_exponential(multiplier=0.5, max=endpoint.longest_wait_s),
        reraise=True,
    )
    try:
        return await attempts(_attempt, client, endpoint, question)
    except _Passing as problem:
        raise EvaluationError(
            f"the judge at {endpoint.url} does not answer ({problem}, "
            f"{endpoint.num_attempts} attempts); judge again when it does"
        ) from None


async def _attempt(client: httpx.AsyncClient, endpoint: Endpoint, question: str) -> str:
    """No error holds what was asked or the body that came: both may hold prompts."""
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    try:
        response = await client.post(f"{endpoint.url.rstrip('/')}/chat/completions", json=body)
    except httpx.RequestError as error:
        raise _Passing(type(error).__name__) from None
    if response.status_code in _PASSING:
        raise _Passing(f"status {response.status_code}")
    if response.status_code != 200:
        raise EvaluationError(
            f"the judge at {endpoint.url} refused with status {response.status_code}: check its "
            "address, the model's name and the key"
        )
    try:
        return str(response.json()["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        raise EvaluationError(f"what {endpoint.url} answers is no chat completion") from None


def _digest(endpoint: Endpoint, question: str) -> str:
    asked = json.dumps([endpoint.url, endpoint.model, MAX_TOKENS, question])
    return hashlib.sha256(asked.encode()).hexdigest()
