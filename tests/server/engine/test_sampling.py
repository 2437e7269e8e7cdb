"""Filters and penalties against plain arithmetic, and draws against the distribution."""

import math
from typing import Any

import pytest
import torch

from server.engine.sampling import adjusted, draw, filtered_probs, logprobs, sample
from server.engine.sequences import ActiveRequest, Sequence
from server.engine.types import EngineInputs, EngineRequest, Prompt, SamplingParams
from steering.methods import RowSteering
from steering.plan import SteeringPlan
from tests.tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()


def row(generated: tuple[int, ...] = (), prompt: tuple[int, ...] = (0,), **params: Any) -> Sequence:
    inputs = EngineInputs(Prompt(prompt, (), torch.arange(len(prompt))[None], len(prompt)))
    request = EngineRequest(
        "r",
        inputs,
        SamplingParams(**({"max_tokens": 9} | params)),
        SteeringPlan(),
        RowSteering(),
        print,
    )
    sequence = Sequence(ActiveRequest(request, 9), 0, TOKENIZER)
    sequence.token_ids = list(generated)
    return sequence


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
PROBS = [math.exp(x) / sum(math.exp(y) for y in (2, 1, 0, -1)) for x in (2, 1, 0, -1)]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 1}, [0]),
        ({"top_p": PROBS[0] - 0.01}, [0]),
        ({"top_p": PROBS[0] + 0.01}, [0, 1]),
        ({"top_p": PROBS[0] + PROBS[1] + 0.01}, [0, 1, 2]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.3}, [0, 1]),
        ({"min_p": 0.1, "top_k": 3}, [0, 1, 2]),
        ({"top_k": 3, "top_p": 0.95}, [0, 1, 2]),
        ({"top_k": 2, "top_p": 0.7}, [0]),
        ({"top_p": 1.0, "top_k": 4}, [0, 1, 2, 3]),
    ],
)
def test_filters_keep_the_right_tokens(params: dict[str, Any], kept: list[int]) -> None:
    (probs,) = filtered_probs(LOGITS, [row(**params)])
    assert probs.nonzero()[:, 0].tolist() == kept
    expected = torch.tensor([PROBS[i] if i in kept else 0.0 for i in range(4)])
    torch.testing.assert_close(probs, expected)


def test_each_row_has_its_own_filters_and_temperature() -> None:
    rows = [row(top_k=1), row(temperature=2.0), row(min_p=0.3)]
    probs = filtered_probs(LOGITS.expand(3, -1), rows)
    assert (probs > 0).sum(dim=-1).tolist() == [1, 4, 2]
    torch.testing.assert_close(probs[1], torch.softmax(LOGITS[0] / 2, dim=-1))


def test_penalties_follow_openai_and_count_answer_tokens_only() -> None:
    penalised = row((1, 1, 2), prompt=(3, 3), presence_penalty=0.5, frequency_penalty=0.25)
    (logits,) = adjusted(LOGITS, [penalised])
    expected = [2.0, 1.0 - 0.5 - 2 * 0.25, 0.0 - 0.5 - 0.25, -1.0]
    torch.testing.assert_close(logits, torch.tensor(expected))


def test_repetition_penalty_counts_the_prompt_and_moves_both_signs_down() -> None:
    (logits,) = adjusted(LOGITS, [row((0,), prompt=(3,), repetition_penalty=2.0)])
    torch.testing.assert_close(logits, torch.tensor([1.0, 1.0, 0.0, -2.0]))


def test_logit_bias_decides_a_greedy_choice_and_leaves_the_logits_alone() -> None:
    logits = LOGITS.expand(2, -1).clone()
    rows = [row(temperature=0.0, logit_bias={3: 100.0}), row(temperature=0.0)]
    assert sample(logits, rows) == [3, 0]
    assert torch.equal(logits, LOGITS.expand(2, -1))


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 1), (0.249, 1), (0.25, 3), (0.999999999999, 3)]
)
def test_a_draw_inverts_the_cumulative_distribution(uniform: float, token: int) -> None:
    """Tokens of no mass are never drawn, at neither end."""
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    assert draw(probs, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_draws_follow_the_distribution() -> None:
    rows = [row(temperature=1.0, seed=seed) for seed in range(4000)]
    drawn = torch.tensor(sample(LOGITS.expand(len(rows), -1), rows))
    for token, expected in enumerate(PROBS):
        share = float((drawn == token).float().mean())
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(rows))


def kept_by_sorting(probs: torch.Tensor, top_k: int, top_p: float) -> list[int]:
    """The plain definition: sort all, cut at top_k, then take until top_p of that is reached."""
    order = sorted(range(len(probs)), key=lambda token: (-float(probs[token]), token))
    order = order[: top_k or len(order)]
    left, kept = top_p * math.fsum(float(probs[token]) for token in order), []
    for token in order:
        if left <= 0 and kept and top_p < 1:
            break
        kept.append(token)
        left -= float(probs[token])
    return sorted(kept)


@pytest.mark.parametrize("scale", [0.3, 2.0, 12.0], ids=["flat", "usual", "peaked"])
def test_filters_of_a_large_vocabulary_are_those_of_sorting_it(scale: float) -> None:
    """Few tokens are ranked where that is enough; of equally likely ones the first are kept."""
    params: list[dict[str, Any]] = [
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"top_k": 50},
        {"top_k": 1},
        {"top_k": 1500, "top_p": 0.6},
        {"top_k": 2999},
        {"top_k": 9000, "top_p": 0.97},
        {"min_p": 0.05, "top_p": 0.8},
        {"min_p": 0.2, "top_k": 1200},
        {},
    ]
    torch.manual_seed(0)
    logits = scale * torch.randn(len(params), 3000).bfloat16().float()  # many are equal
    probs = filtered_probs(logits, [row(**each) for each in params])
    for each, found, own in zip(params, probs, torch.softmax(logits, dim=-1), strict=True):
        expected = kept_by_sorting(own, each.get("top_k", 0), each.get("top_p", 1.0))
        floor = each.get("min_p", 0.0) * float(own.max())
        expected = [token for token in expected if float(own[token]) >= floor]
        difference = set(expected) ^ set(found.nonzero()[:, 0].tolist())
        assert len(difference) <= (1 if each.get("top_p", 1.0) < 1 else 0)  # a boundary's rounding
        assert torch.equal(found[found > 0], own[found > 0])


def test_a_seed_draws_the_same_alone_and_in_a_batch_of_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(6, 40_000)
    params: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 2000, "top_p": 0.5}]

    def rows() -> list[Sequence]:
        return [row(seed=seed, **params[seed % 3]) for seed in range(6)]

    alone = [sample(logits[at : at + 1], [each])[0] for at, each in enumerate(rows())]
    assert sample(logits, rows()) == alone


def test_logits_that_are_no_numbers_give_some_token_and_leave_the_others_theirs() -> None:
    """The request fails afterwards; a token beyond the vocabulary had ended the whole engine."""
    logits = torch.randn(3, 300)
    logits[0, 3] = logits[2, 5] = math.nan
    rows = [row(seed=1, top_logprobs=2), row(seed=2), row(seed=3, top_p=0.9, top_logprobs=0)]
    chosen = sample(logits, rows)
    assert all(0 <= token < 300 for token in chosen)
    assert chosen[1] == sample(logits[1:2], [row(seed=2)])[0]
    assert logprobs(logits, rows, chosen, TOKENIZER)[1] is None


def test_a_draw_from_a_large_vocabulary_inverts_its_cumulative_distribution() -> None:
    """With blocks without mass at both ends and in the middle."""
    torch.manual_seed(0)
    probs = torch.rand(1, 1000)
    probs[0, :200] = probs[0, 300:600] = probs[0, 900:] = 0.0
    cdf = probs[0].double().cumsum(0)
    uniform = torch.rand(500, dtype=torch.float64)
    drawn = draw(probs.expand(500, -1), uniform)
    targets = uniform * cdf[-1]
    assert bool((cdf[drawn] >= targets - 1e-4).all() and (probs[0, drawn] > 0).all())
    assert bool((cdf[drawn] - probs[0, drawn] <= targets + 1e-4).all())
    assert draw(probs, torch.tensor([0.0], dtype=torch.float64)).tolist() == [200]
    assert draw(probs, torch.tensor([1.0], dtype=torch.float64)).tolist() == [899]


def test_a_row_without_top_p_keeps_every_token_beside_one_with_it() -> None:
    """Rounding in the cumulative mass once cost such a row its rarest tokens."""
    logits = torch.linspace(10, -10, 32000)[None].expand(2, -1)
    probs = filtered_probs(logits, [row(), row(top_p=0.5)])
    assert int((probs[0] > 0).sum()) == 32000
    assert int((probs[1] > 0).sum()) < 32000


def test_a_vanishing_temperature_is_greedy() -> None:
    """It once divided the logits into infinity, and the last token was emitted for ever."""
    rows = [row(temperature=t) for t in (1e-39, 1e-320, 1e-6)]
    assert sample(LOGITS.expand(3, -1), rows) == [0, 0, 0]


def test_logprobs_are_of_the_unadjusted_distribution() -> None:
    rows = [row(top_logprobs=2, logit_bias={3: 100.0}), row(), row(top_logprobs=0)]
    first, none, alone = logprobs(LOGITS.expand(3, -1), rows, [3, 0, 1], TOKENIZER)
    assert first is not None and none is None and alone is not None
    assert first.logprob == pytest.approx(math.log(PROBS[3]), abs=1e-5)
    assert [top.token_id for top in first.top] == [0, 1]
    assert first.top[1].logprob == pytest.approx(math.log(PROBS[1]), abs=1e-5)
    assert (alone.token_id, alone.top) == (1, ())
