"""Token ids -> text as it becomes complete, held back while it may turn into a stop string."""

from typing import Any

from tokenizers.decoders import DecodeStream

from server.engine.types import EngineError


class Detokenizer:
    """Incremental decoding of one sequence, in whole characters, without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise EngineError(f"{type(tokenizer).__name__} is not a `tokenizers` tokenizer")
        self._tokenizer = tokenizer
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        """The text that this token completes, maybe empty."""
        text = self._stream.step(self._backend, token_id)
        if text is None:
            self._pending.append(token_id)
            return ""
        self._pending.clear()
        return str(text)

    def flush(self) -> str:
        """What an unfinished character at the end decodes to (U+FFFD), or nothing."""
        if not self._pending:
            return ""
        return str(self._tokenizer.decode(self._pending, skip_special_tokens=True))


class StopMatcher:
    """Passes text on, minus what may be the beginning of a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def step(self, text: str) -> tuple[str, bool]:
        """Return (text that is safe to send, whether a stop string was met).

        The stop string itself and all after it are left out.
        """
        self._held += text
        met = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if met:
            safe, self._held = self._held[: min(met)], ""
            return safe, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        safe, self._held = self._held[:cut], self._held[cut:]
        return safe, False

    def flush(self) -> str:
        """Return what was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((k for k in range(longest, 0, -1) if self._held.endswith(stop[:k])), 0)
