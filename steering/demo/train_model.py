"""The model as it is trained: a frozen language model with low-rank adapters, tower, projector.

Also the one training loop that the language and picture stages share.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from steering.demo.architecture import END_ID, RANK, SCALE, configuration

DECISION_TEMPERATURE = 3.0


class Adapted(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, hidden: Tensor) -> Tensor:
        low = functional.linear(functional.linear(hidden, self.lora_a), self.lora_b)
        return self.base(hidden) + SCALE * low


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its answer; pixels (3, H, W) where the prompt holds a picture.

    is_decided: the answer's first token is a choice (to refuse, or not to) to make firmly.
    """

    prompt: list[int]
    answer: list[int]
    pixels: Tensor | None = None
    is_decided: bool = False


def build(base: dict[str, Tensor], tower: dict[str, Tensor] | None, *, seed: int) -> Any:
    """Build the trainable model; the frozen parts are bfloat16, the trained ones float32."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(configuration())
    model.model.language_model.load_state_dict(
        {
            name.removeprefix("model."): value
            for name, value in base.items()
            if "lm_head" not in name
        }
    )
    model.tie_weights()
    if tower is not None:
        model.model.vision_tower.load_state_dict(tower)
    rms = base["model.embed_tokens.weight"].std().item()
    with torch.no_grad():  # image tokens start at the size of word embeddings
        nn.init.normal_(model.model.multi_modal_projector.linear_1.weight, std=192**-0.5)
        nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=rms * 576**-0.5)
    model.model.language_model.to(torch.bfloat16).requires_grad_(False)
    for layer in model.model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, Adapted(child))
    return model


def trained_state(model: Any) -> dict[str, Tensor]:
    """Everything that training changes, by its name in the model."""
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if "lora_" in name or "vision_tower" in name or "multi_modal_projector" in name
    }


def load_trained(model: Any, path: Path) -> None:
    unexpected = model.load_state_dict(torch.load(path), strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{path} holds {len(unexpected)} unknown tensors, such as {unexpected[0]}")


def fit(
    model: Any,
    batches: Iterable[list[Example]],
    groups: list[dict[str, Any]],
    *,
    steps: int,
    title: str,
    per_answer: bool = False,
    decision_weight: float = 0.0,
) -> None:
    """Train the parameter groups for that many steps; a one-cycle schedule, clipped at norm 1."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        [group["lr"] for group in groups],
        steps,
        pct_start=0.08,
        cycle_momentum=False,
    )
    running = 0.0
    progress = tqdm(zip(range(steps), batches, strict=False), total=steps, desc=title)
    for step, batch in progress:
        loss = answer_loss(model, batch, per_answer=per_answer, decision_weight=decision_weight)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        progress.set_postfix(loss=f"{running:.3f}")


def answer_loss(
    model: Any, batch: list[Example], *, per_answer: bool, decision_weight: float
) -> Tensor:
    """Mean cross-entropy over the batch's answer tokens; padding is on the right.

    per_answer: every answer weighs the same, however long.

    decision_weight: of a second term, which tells the decided examples' first tokens from one
    another; its logits are divided by DECISION_TEMPERATURE, so that the margin becomes wide.
    """
    ids = [torch.tensor(example.prompt + example.answer) for example in batch]
    tokens = pad_sequence(ids, batch_first=True, padding_value=END_ID)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    for row, example in enumerate(batch):  # the token before predicts each answer token
        start = len(example.prompt)
        chosen[row, start - 1 : start - 1 + len(example.answer)] = True
    pixels = [example.pixels for example in batch if example.pixels is not None]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=tokens,
            attention_mask=mask,
            pixel_values=torch.stack(pixels) if pixels else None,
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden[chosen])
    targets = torch.cat([torch.tensor(example.answer) for example in batch])
    each = functional.cross_entropy(logits.float(), targets, reduction="none")
    lengths = torch.tensor([len(example.answer) for example in batch])
    weights = 1 / lengths.repeat_interleave(lengths) if per_answer else torch.ones_like(each)
    loss = (each * weights).sum() / weights.sum()
    if decision_weight == 0.0:
        return loss
    firsts = lengths.cumsum(0) - lengths
    firsts = firsts[torch.tensor([example.is_decided for example in batch])]
    choices, chosen_ones = targets[firsts].unique(return_inverse=True)
    among = logits[firsts][:, choices].float()
    firm = functional.cross_entropy(among / DECISION_TEMPERATURE, chosen_ones)
    return loss + decision_weight * firm


def shuffled(examples: list[Example], size: int, *, seed: int) -> Iterator[list[Example]]:
    """Endless batches, each pass over the examples in a new order."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[index] for index in waiting[:size]]
        del waiting[:size]
