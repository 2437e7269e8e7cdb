"""How long to wait before something that failed is tried again."""

from collections.abc import Iterator


def backoff(first_s: float, longest_s: float) -> Iterator[float]:
    """Seconds before each new attempt: `first_s`, then twice as long each time."""
    delay = first_s
    while True:
        yield delay
        delay = min(2 * delay, longest_s)
