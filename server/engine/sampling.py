"""Logits -> token ids and log-probabilities. Pure but for each sequence's own random numbers.

Order of filters: penalties and biases, temperature, top_k, top_p, min_p; then inverse-CDF
sampling with one uniform number a row, so a seeded sequence is the same in any batch.
"""

from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.sequences import Sequence
from server.engine.text import token_bytes
from server.engine.types import TokenLogprob

MANY_LIKELY = 1024  # tokens that are ranked at first
BLOCK = 128  # tokens
GREEDY_BELOW = 1e-5  # a temperature that small divides logits into infinity


def sample(logits: Tensor, rows: Seq[Sequence]) -> list[int]:
    """Choose a token for each row: logits (B, V) float32 -> B token ids.

    Greedy rows take the first largest logit. `logits` is not modified.
    """
    logits = adjusted(logits, rows)
    chosen = _largest(logits)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > GREEDY_BELOW]
    if drawn:
        probs = filtered_probs(logits[drawn], [rows[i] for i in drawn])
        uniform = torch.tensor([rows[i].uniform() for i in drawn], dtype=torch.float64)
        for i, token in zip(drawn, draw(probs, uniform.to(probs.device)).tolist(), strict=True):
            chosen[i] = token
    return chosen


def _largest(logits: Tensor) -> list[int]:
    """The first largest of each row. On a CPU by NumPy, which takes a tenth of torch's time."""
    if logits.device.type == "cpu":
        first: list[int] = logits.numpy().argmax(axis=-1).tolist()
        return first
    return [int(index) for index in logits.argmax(dim=-1).tolist()]


def adjusted(logits: Tensor, rows: Seq[Sequence]) -> Tensor:
    """Apply penalties and biases; (B, V) -> (B, V), the same tensor where no row asks for any."""
    asking = [i for i, row in enumerate(rows) if _is_adjusted(row)]
    if not asking:
        return logits
    logits = logits.clone()
    for i in asking:
        _adjust(logits[i], rows[i])
    return logits


def _is_adjusted(row: Sequence) -> bool:
    p = row.params
    penalised = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
    return bool(penalised or p.logit_bias)


def _adjust(logits: Tensor, row: Sequence) -> None:
    """Change one row (V,) in place, a view of the caller's own copy."""
    p = row.params
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.active.request.inputs.prompt.token_ids, *row.token_ids}))
        seen = seen.to(logits.device)
        values = logits[seen]
        factor = p.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if row.token_ids and (p.presence_penalty or p.frequency_penalty):
        counts = Counter(row.token_ids)
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[ids] -= p.presence_penalty + p.frequency_penalty * times
    if p.logit_bias:
        ids = torch.tensor(list(p.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(p.logit_bias.values()), device=logits.device)


def filtered_probs(logits: Tensor, rows: Seq[Sequence]) -> Tensor:
    """Probabilities after temperature, top_k, top_p and min_p: (B, V) -> (B, V), not renormalised.

    top_p keeps the smallest set of most likely tokens whose mass reaches it, at least one.
    """
    probs = torch.softmax(logits / _column([r.params.temperature for r in rows], logits), dim=-1)
    ranking = [i for i, r in enumerate(rows) if r.params.top_k or r.params.top_p < 1]
    if ranking:
        ranked = probs[ranking]
        probs[ranking] = ranked * _most_likely(ranked, [rows[i] for i in ranking])
    if any(r.params.min_p for r in rows):
        floor = _column([r.params.min_p for r in rows], probs) * probs.amax(dim=-1, keepdim=True)
        probs = probs * (probs >= floor)
    return probs


def _column(values: list[float], like: Tensor) -> Tensor:
    """(B, 1)."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _most_likely(probs: Tensor, rows: Seq[Sequence]) -> Tensor:
    """(B, V) bool: the tokens that top_k and top_p keep; of equally likely ones the first.

    To rank a whole vocabulary takes longer than a decode step: as many are as mostly suffice.
    """
    least, num_kept, is_all = _least_likely(probs, rows, MANY_LIKELY)
    if not bool(is_all.all()):
        short = [i for i, enough in enumerate(is_all.tolist()) if not enough]
        again = _least_likely(probs[short], [rows[i] for i in short], probs.shape[-1])
        least[short], num_kept[short] = again[:2]
    above, as_likely = probs > least, probs == least
    num_more = num_kept - above.sum(dim=-1, keepdim=True)
    return above | (as_likely & (as_likely.cumsum(dim=-1, dtype=torch.int32) <= num_more))


def _least_likely(
    probs: Tensor, rows: Seq[Sequence], num_ranked: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens that top_k and top_p keep: the probability of the least likely (B, 1), how
    many there are (B, 1), and whether that is known (B,) from so many of the most likely ones."""
    vocab = probs.shape[-1]
    ranked = probs.topk(min(num_ranked, vocab), dim=-1).values
    rank = torch.arange(ranked.shape[-1], device=probs.device)
    top_k = _column([float(r.params.top_k or vocab) for r in rows], probs)
    top_p = _column([r.params.top_p for r in rows], probs)
    ranked = ranked * (rank < top_k)
    is_cut = top_k <= ranked.shape[-1]
    reached = ranked.cumsum(dim=-1)
    whole = _blocks(probs).sum(dim=-1).sum(dim=-1, keepdim=True)
    mass = torch.where(is_cut, reached[:, -1:], whole)
    kept = (rank < top_k) & ((reached - ranked < top_p * mass) | (top_p >= 1))
    kept[:, 0] = True
    num_kept = kept.sum(dim=-1, keepdim=True)
    is_found = (num_kept < ranked.shape[-1]) & (top_k >= vocab)  # else mass is not top_k's
    is_all = is_cut | is_found | (ranked.shape[-1] == vocab)
    return ranked.gather(-1, num_kept - 1), num_kept, is_all[:, 0]


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: probs (B, V), any positive mass; uniform (B,) in [0, 1) -> (B,).

    First a block of tokens, then one within it: to sum up a vocabulary takes a tenth of a step. Of
    probabilities that are no numbers it is any token.
    """
    blocks = _blocks(probs)
    mass = blocks.sum(dim=-1).double()
    block, left = _first_beyond(mass, uniform * mass.sum(dim=-1))
    rows = torch.arange(len(probs), device=probs.device)
    index, _ = _first_beyond(blocks[rows, block].double(), left)
    return (BLOCK * block + index).clamp(max=probs.shape[-1] - 1)


def _blocks(probs: Tensor) -> Tensor:
    """(B, V) -> (B, blocks, BLOCK), zeros behind the last. torch adds up a long row in another
    order when it is alone, and a block never."""
    padded = nn.functional.pad(probs, (0, -probs.shape[-1] % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK))


def _first_beyond(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of mass (B, N) the first at which the sum is beyond target (B,), with what is left of the
    target there; never one without mass, where there is any."""
    cdf = mass.cumsum(dim=-1)
    # right=True: a target equal to a boundary belongs to the next with mass.
    index = torch.searchsorted(cdf, target[:, None], right=True)
    last = mass.shape[-1] - 1 - (mass > 0).flip(-1).int().argmax(dim=-1, keepdim=True)
    index = torch.minimum(index, last)
    before = (cdf - mass).gather(-1, index)[:, 0]
    return index[:, 0], (target - before).clamp(min=0.0)


def logprobs(
    logits: Tensor, rows: Seq[Sequence], chosen: list[int], tokenizer: Any
) -> list[TokenLogprob | None]:
    """The chosen tokens' log-probabilities under the unadjusted distribution, where asked."""
    asking = [i for i, row in enumerate(rows) if row.params.top_logprobs is not None]
    result: list[TokenLogprob | None] = [None] * len(rows)
    if not asking:
        return result
    log_p = torch.log_softmax(logits[asking], dim=-1)
    for at, i in enumerate(asking):
        values, ids = log_p[at].topk(rows[i].params.top_logprobs or 0)
        top = tuple(
            _token_logprob(tokenizer, token, value)
            for token, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
        result[i] = _token_logprob(tokenizer, chosen[i], float(log_p[at, chosen[i]]), top)
    return result


def _token_logprob(
    tokenizer: Any, token_id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()
) -> TokenLogprob:
    raw = token_bytes(tokenizer, token_id)
    return TokenLogprob(token_id, raw.decode(errors="replace"), raw, max(logprob, -9999.0), top)
