"""Scenario `second-turn`: how much sooner the second answer about the same picture begins."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.bench.load import Served, Switch, in_turn
from server.bench.prompts import FOLLOW_UP, Prompts
from server.bench.stream import StreamRecord
from server.bench.summary import Interval, Spread

SECOND_TOKENS = 4


@dataclass(frozen=True)
class SecondTurn:
    """One server, one conversation at a time; first, second: time to first token in seconds.

    ratio: second over first within each conversation. cached_tokens of second_prompt_tokens: what
    the server says it had kept of the second prompt.
    """

    target: str
    first: Spread | None
    second: Spread | None
    ratio: Interval | None
    cached_tokens: Spread | None
    second_prompt_tokens: Spread | None
    num_failed: int
    first_error: str


async def run(
    columns: Sequence[Served],
    prompts: Prompts,
    *,
    rounds: int,
    max_tokens: int,
    warmup: int = 1,
    pause_s: float,
    progress: Callable[[str], None],
) -> list[SecondTurn]:
    """A question about a photograph, an answer of `max_tokens`, then a second question."""
    numbers, switch = itertools.count(), Switch(pause_s)
    turns: dict[str, list[tuple[StreamRecord, StreamRecord]]] = {c.name: [] for c in columns}
    for round_ in range(-warmup, rounds):
        for column in in_turn(columns, round_):
            progress(column.name)
            messages = prompts.about_picture(next(numbers), round_, new_size=column.new_sizes)
            await switch.to(column)
            [first] = await column.answer([messages], max_tokens)
            answer = {"role": "assistant", "content": first.text}
            question = {"role": "user", "content": FOLLOW_UP}
            [second] = await column.answer([[*messages, answer, question]], SECOND_TOKENS)
            if round_ >= 0:
                turns[column.name].append((first, second))
    return [_result(name, pairs) for name, pairs in turns.items()]


def _result(name: str, pairs: Sequence[tuple[StreamRecord, StreamRecord]]) -> SecondTurn:
    good = [(a, b) for a, b in pairs if not (a.error or b.error)]
    errors = [record.error for pair in pairs for record in pair if record.error]
    return SecondTurn(
        target=name,
        first=Spread.of(a.time_to_first_token_s for a, _ in good),
        second=Spread.of(b.time_to_first_token_s for _, b in good),
        ratio=Interval.of(b.time_to_first_token_s / a.time_to_first_token_s for a, b in good),
        cached_tokens=Spread.of(b.cached_tokens for _, b in good),
        second_prompt_tokens=Spread.of(b.prompt_tokens for _, b in good),
        num_failed=len(pairs) - len(good),
        first_error=errors[0] if errors else "",
    )
