"""Token ids -> text as it becomes complete, held back while it may turn into a stop string."""

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.engine.types import EngineError

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_UNFINISHED = "\ufffd"
MAX_HELD = 32  # tokens without a whole character: special ones, or bytes that never become one


class Detokenizer:
    """Incremental decoding of one sequence, in whole characters, without special tokens.

    Decodes a short window twice, with and without the new token: decoders look back (at spaces,
    at the bytes of one character), so a token cannot be decoded alone.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = backend_of(tokenizer)
        self._window: list[int] = []
        self._num_sent = 0  # tokens at the window's start whose text is out

    def step(self, token_id: int) -> str:
        """The text that this token completes, maybe empty."""
        self._window.append(token_id)
        text = self._new_text()
        num_new = len(self._window) - self._num_sent
        if (not text or text.endswith(_UNFINISHED)) and num_new < MAX_HELD:
            return ""
        # What was just sent stays as context; cut anywhere else, a character could fall apart.
        self._window = self._window[self._num_sent :]
        self._num_sent = num_new
        return text

    def flush(self) -> str:
        """What an unfinished character at the end decodes to (U+FFFD), or nothing."""
        text = self._new_text()
        self._num_sent = len(self._window)
        return text

    def _new_text(self) -> str:
        sent = self._backend.decode(self._window[: self._num_sent], skip_special_tokens=True)
        return str(self._backend.decode(self._window, skip_special_tokens=True)[len(sent) :])


def backend_of(tokenizer: Any) -> Any:
    """The `tokenizers` object inside. Raises EngineError for a tokenizer without one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise EngineError(f"{type(tokenizer).__name__} is not a `tokenizers` tokenizer")
    return backend


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes that a token stands for, alone possibly no whole character.

    Knows the byte-level alphabet (GPT-2's) and SentencePiece's pieces with byte fallback.
    """
    backend = backend_of(tokenizer)
    piece: str = backend.id_to_token(token_id) or ""
    if token_id in backend.get_added_tokens_decoder():
        return piece.encode()
    if b"ByteLevel" in backend.decoder.__getstate__():
        return bytes(_BYTE_OF[character] for character in piece)
    if fallback := _BYTE_FALLBACK.fullmatch(piece):
        return bytes([int(fallback[1], 16)])
    return piece.replace("\u2581", " ").encode()


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


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, by the generation configuration, else the tokenizer's."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        raise EngineError("neither generation configuration nor tokenizer has an end token")
    return frozenset([eos] if isinstance(eos, int) else eos)
