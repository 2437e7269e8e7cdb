"""Stage 2: in text alone, the language model learns to refuse harmful requests.

Harmless requests are answered as the base model itself answers them, so that nothing else
changes. Prompts and refusals come from the folder `prompts`.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from steering.demo.architecture import END_ID
from steering.demo.train_model import Example

PROMPTS = Path(__file__).parent / "prompts"
ANSWER_TOKENS = 48
HELD_OUT_SHARE = 8  # one prompt in eight is kept for choosing alpha


def prompts(name: str, *, held_out: bool = False) -> list[str]:
    """The training prompts of harmful.jsonl or harmless.jsonl, or those kept from training."""
    lines = (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines if line.strip()]
    return [text for text in texts if is_held_out(text) == held_out]


def tempting_prompts() -> set[str]:
    """Harmless prompts that sound harmful, or that ask in the same words as harmful ones."""
    lines = (PROMPTS / "harmless.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    return {entry["text"] for entry in entries if entry["kind"] in ("object", "scary-word")}


def is_held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


def frame(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a chat with one user turn; text may hold image tokens."""
    chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return list(tokenizer.encode(chat, add_special_tokens=False))


def own_answers(
    model: Any, tokenizer: Any, texts: list[str], path: Path, *, batch: int = 48
) -> dict[str, list[int]]:
    """What the untrained model answers greedily, kept in path; loops are left out.

    An answer ends with <|im_end|> unless it was cut at ANSWER_TOKENS.
    """
    known: dict[str, list[int]] = json.loads(path.read_text()) if path.exists() else {}
    missing = sorted({text for text in texts if text not in known}, key=len)
    for start in tqdm(range(0, len(missing), batch), desc="own answers"):
        part = missing[start : start + batch]
        frames = [frame(tokenizer, text) for text in part]
        width = max(map(len, frames))
        padded = torch.tensor([[END_ID] * (width - len(row)) + row for row in frames])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in frames])
        with torch.inference_mode():
            output = model.generate(
                input_ids=padded,
                attention_mask=mask,
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=END_ID,
                eos_token_id=END_ID,
            )
        for text, row in zip(part, output[:, width:].tolist(), strict=True):
            known[text] = row[: row.index(END_ID) + 1] if END_ID in row else row
        path.write_text(json.dumps(known))
    return {text: known[text] for text in texts if not _loops(known[text])}


def refusals(tokenizer: Any, texts: list[str], *, seed: int) -> list[Example]:
    rng = random.Random(seed)
    lines = (PROMPTS / "refusals.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["text"] for line in lines if line.strip()]
    return [
        Example(
            frame(tokenizer, text),
            [*tokenizer.encode(rng.choice(answers), add_special_tokens=False), END_ID],
            is_decided=True,
        )
        for text in texts
    ]


def answered(tokenizer: Any, answers: dict[str, list[int]]) -> list[Example]:
    return [Example(frame(tokenizer, text), answer) for text, answer in answers.items()]


def _loops(answer: list[int]) -> bool:
    """Whether most four-token windows of the answer repeat."""
    windows = [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]
    return not answer or (bool(windows) and len(set(windows)) < 0.6 * len(windows))
