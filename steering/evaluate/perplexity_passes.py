"""Measuring how likely the bare model finds a run's answers: teacher forcing, unsteered.

Each prompt runs once as each way of showing its picture has it, and once as text alone; the
answers of all conditions go on from its keys and values, equal ones once. Reads no server.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from steering.errors import EvaluationError
from steering.evaluate.conditions import PictureUse
from steering.evaluate.items import Item
from steering.evaluate.judge import answer_digest
from steering.evaluate.perplexity import Scored, is_empty
from steering.evaluate.pictures import asked_image, asked_text
from steering.evaluate.record import Answer, RunDir
from steering.extract import prompt_inputs
from steering.models import LoadedModel

_MAX_ROWS = 16
_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
_MAX_LOGITS = 2**25  # of one pass: 134 MB in float32


@dataclass(frozen=True)
class Prompt:
    """A prompt that has run but for its last token, after which the answer's first is scored.

    cache: keys and values. position: of the last token; pictures may make that another one than
    its place among the tokens.
    """

    cache: Any
    last_token: int
    position: int


def measure_perplexity(
    run_dir: Path,
    loaded: LoadedModel,
    *,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[Scored]:
    """Score every answer that came and is not empty, prompt by prompt.

    progress: prompts done, of how many. Raises EvaluationError: no run, an answer whose prompt or
    condition the run does not hold, a picture that cannot be read, likelihoods that are no numbers.
    """
    run = RunDir(run_dir)
    uses = {each["name"]: each["picture"] for each in run.settings().get("conditions", ())}
    items = {(item.suite, item.id): item for item in run.items()}
    scorer = Scorer(loaded)
    found: list[Scored] = []
    answers: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in run.answers():
        if answer.condition not in uses or (answer.suite, answer.id) not in items:
            raise EvaluationError(
                f"{run_dir}: it does not say how {answer.suite}/{answer.id} was asked as "
                f"{answer.condition!r}"
            )
        is_scored = answer.error is None and not is_empty(answer)
        if is_scored and scorer.token_ids(answer.answer):  # some characters make no token
            answers[answer.suite, answer.id].append(answer)
    for done, (place, here) in enumerate(answers.items(), start=1):
        found += _scored(scorer, items[place], here, uses)
        progress(done, len(answers))
    return found


def _scored(
    scorer: "Scorer", item: Item, answers: Sequence[Answer], uses: Mapping[str, PictureUse]
) -> Iterator[Scored]:
    """The answers to one prompt."""
    texts: dict[PictureUse, set[str]] = defaultdict(set)
    for answer in answers:
        for use in (uses[answer.condition], "none"):
            texts[use].add(answer.answer)
    nlls = {
        use: scorer.nlls(asked_text(item, use), asked_image(item, use), sorted(here))
        for use, here in texts.items()
    }
    for answer in answers:
        asked, text = (nlls[use][answer.answer] for use in (uses[answer.condition], "none"))
        if not (math.isfinite(asked) and math.isfinite(text)):
            raise EvaluationError(
                f"suite {item.suite}, {item.id}: its likelihood is no number; try --dtype float32"
            )
        yield Scored(
            condition=answer.condition,
            suite=answer.suite,
            id=answer.id,
            answer_digest=answer_digest(answer),
            num_tokens=len(scorer.token_ids(answer.answer)),
            nll_asked=round(asked, 6),
            nll_text=round(text, 6),
            weights_digest=scorer.weights_digest,
            dtype=scorer.dtype,
        )


class Scorer:
    """Likelihoods of answers after one prompt at a time."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model, self._processor = loaded.model, loaded.processor
        self.weights_digest, self.dtype = loaded.identity.weights_digest, loaded.identity.dtype

    def token_ids(self, answer: str) -> list[int]:
        """Of the text alone: an answer follows its prompt's last mark and joins no token of it. A
        control token that the text spells is text."""
        whole = answer.encode(errors="replace").decode()  # older runs may hold half a character
        encoded = self._processor.tokenizer(
            whole, add_special_tokens=False, split_special_tokens=True
        )
        return list(encoded["input_ids"])

    @torch.inference_mode()
    def nlls(
        self, text: str, image: Image.Image | None, answers: Sequence[str]
    ) -> dict[str, float]:
        """Mean negative log-likelihood of each answer's tokens, in nats, after one user turn."""
        prompt = self._run(text, image)
        tokens = {answer: self.token_ids(answer) for answer in answers}
        found: dict[str, float] = {}
        for batch in _batches(tokens, self._model.get_output_embeddings().weight.shape[0]):
            rows = [tokens[answer] for answer in batch]
            found.update(zip(batch, self._after(prompt, rows), strict=True))
        return found

    def _run(self, text: str, image: Image.Image | None) -> Prompt:
        inputs = prompt_inputs(self._model, self._processor, [text], image)
        place = inputs["input_ids"].shape[1] - 1
        last_token = int(inputs["input_ids"][0, -1])
        for name in inputs.keys() & _OF_TOKENS:
            inputs[name] = inputs[name][:, :-1]
        makes_positions = "image_grid_thw" in inputs  # M-RoPE: fewer than a picture has tokens
        if not makes_positions:
            inputs["position_ids"] = torch.arange(place, device=self._model.device)[None]
        cache = self._model.base_model(**inputs, use_cache=True).past_key_values
        jump = int(self._model.base_model.rope_deltas) if makes_positions else 0
        return Prompt(cache, last_token, place + jump)

    def _after(self, prompt: Prompt, rows: Sequence[list[int]]) -> list[float]:
        """Padded on the right, where causal attention keeps it from every token that counts."""
        targets = torch.full((len(rows), max(map(len, rows))), -1)
        for place, row in enumerate(rows):
            targets[place, : len(row)] = torch.tensor(row)
        targets = targets.to(self._model.device)
        counts = targets >= 0
        inputs = targets.clamp_min(0).roll(1, dims=1)
        inputs[:, 0] = prompt.last_token
        cache = copy.deepcopy(prompt.cache)
        cache.batch_repeat_interleave(len(rows))
        positions = prompt.position + torch.arange(targets.shape[1], device=targets.device)
        output = self._model(
            input_ids=inputs, past_key_values=cache, position_ids=positions.expand(len(rows), -1)
        )
        losses = torch.zeros(targets.shape, device=targets.device)
        losses[counts] = torch.nn.functional.cross_entropy(
            output.logits[counts].float(), targets[counts], reduction="none"
        )
        return list((losses.sum(dim=1) / counts.sum(dim=1)).tolist())


def _batches(tokens: Mapping[str, Sequence[int]], vocabulary: int) -> Iterator[list[str]]:
    """Answers of about one length together, as many as one pass may hold."""
    batch: list[str] = []
    for answer in sorted(tokens, key=lambda answer: len(tokens[answer])):
        too_large = (len(batch) + 1) * len(tokens[answer]) * vocabulary > _MAX_LOGITS
        if batch and (too_large or len(batch) == _MAX_ROWS):
            yield batch
            batch = []
        batch.append(answer)
    if batch:
        yield batch
