"""Host memory of a server's process as Linux counts it, and what its settings allow it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from server.bench.target import BenchError
from server.config import Settings

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Footprint:
    """Resident bytes of a process: now, and the most since it started (loading included)."""

    now_bytes: int
    peak_bytes: int

    @classmethod
    def of(cls, pid: int) -> "Footprint | None":
        """None where the process has ended or the system has no /proc."""
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return None
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        if "VmRSS" not in values:
            return None
        now, peak = (1024 * int(values[name].split()[0]) for name in ("VmRSS", "VmHWM"))
        return cls(now, max(now, peak))  # Linux brings VmHWM up to date late


@dataclass(frozen=True)
class Budget:
    """Bytes that a server of ours may fill: weights, KV cache and the two caches."""

    weights_bytes: int
    kv_bytes: int
    caches_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.caches_bytes


def budget(model: Path, settings: Settings, dtype: str) -> Budget:
    """From a checkpoint's files and the server's settings; `dtype` as the server runs it.

    Raises BenchError where the checkpoint's config.json is not that of a known model.
    """
    num_values, max_len = _kv_shape(model)
    tokens = settings.kv_tokens or settings.max_rows * min(settings.max_model_len, max_len)
    num_weights = sum(_num_weights(path) for path in model.glob("*.safetensors"))
    return Budget(
        weights_bytes=num_weights * DTYPES[dtype],
        kv_bytes=tokens * num_values * DTYPES[dtype],
        caches_bytes=settings.prefix_cache_bytes + settings.vision_cache_bytes,
    )


def _kv_shape(model: Path) -> tuple[int, int]:
    """(keys and values of one token over all layers, the longest sequence in tokens).

    As transformers reads config.json: real ones leave out what equals the defaults of their
    model type, and older ones have no `text_config`.
    """
    from transformers import AutoConfig  # seconds

    try:
        text = AutoConfig.from_pretrained(str(model), local_files_only=True).get_text_config()
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        num_values = 2 * text.num_hidden_layers * kv_heads * head_dim
        return num_values, text.max_position_embeddings
    # Validation of the config's fields raises StrictDataclassError, which is none of the others.
    except (OSError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise BenchError(f"{model / 'config.json'} has no usable sizes: {error}") from error


def _num_weights(path: Path) -> int:
    """The numbers in a safetensors file, by its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if "shape" in entry)
