"""Prefix cache: keys and values of prompts' beginnings, for later prompts that begin alike.

Only positions before a prompt's last token are kept. No plan steers them, so their KV is the same
whatever alpha is and serves requests of any plan (DESIGN.md, sections 1 and 4); generated tokens
are not kept. Does not compute KV and owns no prompt's cache.
No locks: used on the engine thread only; other threads may read the counters.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.lru import TensorLRU
from server.engine.stats import Asker, CacheUse
from server.engine.types import Prompt

BLOCK_LEN = 16


class Block(NamedTuple):
    """Tokens [start, end) of a prompt; `key` stands for them and for all before them."""

    start: int
    end: int
    key: bytes


def blocks_of(prompt: Prompt, namespace: str) -> Iterator[Block]:
    """Cut a prompt into the blocks that may be kept: those that end before its last token.

    A block ends after BLOCK_LEN tokens or where a picture ends, so that a prefix which ends with a
    picture is reused whole, and so that two prompts are cut alike as far as they are alike.

    The keys are a chain of sha256: each covers the key before it and all that the block's KV is a
    function of: token ids, rotary positions, and digest and extent of every picture that begins in
    it (a picture goes in whole: its tokens may attend to later ones of its own). Positions follow
    from tokens and pictures' sizes in the families of today; hashing them asks for no such rule.
    The namespace enters at the first block that is not wholly within `shared_len`: every key from
    there on is the namespace's own.
    """
    words = _words(prompt)
    key, start, is_shared = b"", 0, True
    while start < len(prompt):
        end = min([start + BLOCK_LEN, *(image.end for image in prompt.images if image.end > start)])
        if end >= len(prompt):
            return
        if is_shared and end > prompt.shared_len:
            key, is_shared = _chain(key, b"namespace", namespace.encode()), False
        pictures = [
            f"{image.digest} {image.start - start} {image.end - start}".encode()
            for image in prompt.images
            if start <= image.start < end
        ]
        key = _chain(key, b"block", words[start:end].tobytes(), *pictures)
        yield Block(start, end, key)
        start = end


class PrefixCache:
    """Blocks of KV under a byte budget, least recently used first to go; 0 turns it off.

    A block is of no use without those before it, so a prompt's blocks are always touched from the
    last to the first: whatever goes, its descendants have gone before.
    By whose prompt asked: `hit_tokens` were loaded, `missed_tokens` are the rest of those prompts.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._blocks: TensorLRU[bytes] = TensorLRU(budget_bytes)
        self.hit_tokens: dict[Asker, int] = {"own": 0, "shift": 0}
        self.missed_tokens: dict[Asker, int] = {"own": 0, "shift": 0}

    @property
    def num_bytes(self) -> int:
        """Memory that the kept KV takes; never more than the budget."""
        return self._blocks.num_bytes

    def use(self) -> dict[Asker, CacheUse]:
        """What it came to so far; the bytes, which are nobody's, stand under `own`."""
        budget = self._blocks.budget_bytes
        hits, misses = self.hit_tokens, self.missed_tokens
        return {
            "own": CacheUse(hits["own"], misses["own"], self.num_bytes, budget),
            "shift": CacheUse(hits["shift"], misses["shift"]),
        }

    def load(self, blocks: Sequence[Block], kv: Tensor, asker: Asker = "own") -> int:
        """Copy the longest kept beginning of a prompt into kv[..., :n, :]; returns n.

        blocks: the prompt's, by `blocks_of`. kv (L, 2, H, T, Dh): room for the keys and values of
        its T tokens, of the model's own dtype. n < T, for the last token must be computed: it is
        steered and its logits are needed. n may lie within a picture, when the blocks after it had
        to go.
        """
        kept = list(takewhile(self._keeps, blocks))
        num_tokens = kept[-1].end if kept else 0
        if kept:
            parts = self._touch(kept)
            torch.cat(parts, dim=3, out=kv[..., :num_tokens, :])
        self.hit_tokens[asker] += num_tokens
        self.missed_tokens[asker] += kv.shape[3] - num_tokens
        return num_tokens

    def store(self, blocks: Sequence[Block], kv: Tensor, num_computed: int) -> None:
        """Keep copies of the blocks that are not kept yet.

        kv (L, 2, H, T, Dh): the prompt's keys and values, computed up to token `num_computed`. As
        many blocks from the start as the budget holds; none from the first on that holds NaN
        or infinity.
        """
        max_tokens = min(self._blocks.budget_bytes // kv[..., :1, :].nbytes, num_computed)
        fitting = list(takewhile(lambda block: block.end <= max_tokens, blocks))
        kept = list(takewhile(self._keeps, fitting))
        self._touch(kept)  # so that none of them makes room for its own descendants
        try:
            for block in fitting[len(kept) :]:
                if not self._blocks.put(block.key, kv[..., block.start : block.end, :]):
                    break
                kept.append(block)
        finally:  # also when memory runs out
            self._touch(kept)

    def clear(self) -> None:
        """Forget all KV; the counters go on."""
        self._blocks.clear()

    def _keeps(self, block: Block) -> bool:
        return block.key in self._blocks

    def _touch(self, blocks: list[Block]) -> list[Tensor]:
        """Make kept blocks, which begin with a prompt's first, the last to go; returns their KV."""
        return [self._blocks.use(block.key) for block in reversed(blocks)][::-1]


def _words(prompt: Prompt) -> NDArray[np.int64]:
    """(T, 4): each token's id and its three rotary positions, equal where the prompt has one, so
    that a text-only prompt and one with pictures share the beginning that they have in common."""
    token_ids = torch.tensor(prompt.token_ids, dtype=torch.int64)
    positions = prompt.position_ids.expand(3, -1)
    return torch.cat([token_ids[None], positions]).T.contiguous().numpy()


def _chain(parent: bytes, *parts: bytes) -> bytes:
    """sha256 of the parts, each after its length: no two lists of parts give the same bytes."""
    digest = hashlib.sha256()
    for part in (parent, *parts):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
