"""Logits -> token ids and log-probabilities. Pure but for each sequence's own random numbers.

Order of filters: penalties and biases, temperature, top_k, top_p, min_p; then inverse-CDF
sampling with one uniform number a row, so a seeded sequence is the same in any batch.
"""

from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from server.engine.sequences import Sequence
from server.engine.text import token_bytes
from server.engine.types import TokenLogprob

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

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]

    probs = torch.softmax(logits / column([r.params.temperature for r in rows]), dim=-1)
    if any(r.params.top_k or r.params.top_p < 1 for r in rows):
        vocab = logits.shape[-1]
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(vocab, device=logits.device)
        keep = rank < column([float(r.params.top_k or vocab) for r in rows])
        ranked = ranked * keep
        mass = ranked.cumsum(dim=-1)
        before = mass - ranked
        top_p = column([r.params.top_p for r in rows])
        keep = (before < top_p * mass[:, -1:]) | (top_p >= 1)
        keep[:, 0] = True
        probs = torch.zeros_like(probs).scatter(-1, order, ranked * keep)
    if any(r.params.min_p for r in rows):
        floor = column([r.params.min_p for r in rows]) * probs.amax(dim=-1, keepdim=True)
        probs = probs * (probs >= floor)
    return probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: probs (B, V), any positive mass; uniform (B,) in [0, 1) -> (B,)."""
    cdf = probs.double().cumsum(dim=-1)
    target = (uniform * cdf[:, -1])[:, None]
    # right=True: a target equal to a boundary belongs to the next token with mass.
    index = torch.searchsorted(cdf, target, right=True)[:, 0]
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(index, last)


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
