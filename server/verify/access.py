"""What a server lets requests ask for, and requests that run beside each other."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server.bench.prompts import Message
from server.verify.check import RefusedError, VerifyError
from server.verify.client import OFF, Answer, Asker, Wish

Override = Literal["none", "strengthen", "any"]
Request = tuple[list[Message], Wish | None]
NUM_NEIGHBOURS = 8
NEIGHBOUR_TOKENS = 24
HIGHER = (2.0, 1.5, 1.1)  # times the policy's alpha: the first that is within the bounds is taken


@dataclass(frozen=True)
class Access:
    """override: how far requests are heard. stronger: a wish for more alpha than the policy's.
    has_sample: they may ask for the sample level."""

    asker: Asker
    override: Override = "none"
    stronger: Wish | None = None
    has_sample: bool = False

    @property
    def may_unsteer(self) -> bool:
        return self.override == "any"

    def unsteered(self, num_words: int) -> Request:
        """With a picture where that may be asked for, else text, which is never steered."""
        prompt = self.asker.fresh(num_words, has_picture=self.may_unsteer)
        return prompt, OFF if self.may_unsteer else None

    def unsteered_neighbours(self) -> list[Request]:
        return [self.unsteered(2 + 2 * number) for number in range(NUM_NEIGHBOURS)]

    def neighbours(self) -> list[Request]:
        """Of all kinds that may be asked for, and of different lengths."""
        kinds: list[Wish | None] = [self.stronger, None]
        if self.may_unsteer:
            kinds += [OFF, {"alpha": 0}]
        if self.has_sample:
            kinds.append({"mode": "sample"})
        asked = [
            (self.asker.fresh(2 + 2 * number), kinds[number % len(kinds)])
            for number in range(NUM_NEIGHBOURS - 1)
        ]
        return [*asked, (self.asker.fresh(16, has_picture=False), None)]

    async def beside(
        self, prompt: list[Message], wish: Wish | None, neighbours: Sequence[Request]
    ) -> tuple[Answer, int]:
        """The answer beside the others, and how many of them outlasted it."""
        others = [
            asyncio.create_task(self.asker.ask(*each, max_tokens=NEIGHBOUR_TOKENS))
            for each in neighbours
        ]
        try:
            answer = await self.asker.ask(prompt, wish)
            num_beside = sum(not other.done() for other in others)
            await asyncio.gather(*others)
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        return answer, num_beside


async def found_out(asker: Asker, first: Answer) -> Access:
    """By asking. first: an answer under the policy. Raises VerifyError for an odd refusal."""
    override: Override = "any" if await _is_taken(asker, OFF) else "none"
    stronger: Wish | None = None
    # Where nothing is steered there is no alpha to go by, and no more than off to compare with.
    alpha = float(first.header.get("alpha", 0)) or 1.0
    for factor in HIGHER:
        wish = {"alpha": round(factor * alpha, 6)}
        if await _is_taken(asker, wish):
            stronger, override = wish, "any" if override == "any" else "strengthen"
            break
    has_sample = override == "any" and await _is_taken(asker, {"mode": "sample"})
    return Access(asker, override, stronger, has_sample)


async def _is_taken(asker: Asker, wish: Wish) -> bool:
    try:
        await asker.ask(asker.fresh(), wish, max_tokens=1)
    except RefusedError as refused:
        if refused.status in (400, 403):  # not allowed, or beyond alpha_max or the dose's cap
            return False
        raise VerifyError(f"a request was refused: {refused}") from None
    return True
