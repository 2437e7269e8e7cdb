"""What a server may fill, from configs as they are found in the wild."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.bench.footprint import budget
from server.bench.target import BenchError
from server.config import Settings

SETTINGS = Settings(max_rows=2, max_model_len=1000, prefix_cache_bytes=30, vision_cache_bytes=5)


def checkpoint(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, directory / "model.safetensors")
    return directory


def test_what_a_config_leaves_out_is_the_default_of_its_model_type(tmp_path: Path) -> None:
    """llava-1.5-7b-hf names neither layers nor heads; reading the file alone broke the bench."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}
    model = checkpoint(tmp_path, {"model_type": "llava", "text_config": text})
    found = budget(model, SETTINGS, "bfloat16")
    # Keys and values of 32 layers, 32 heads of 128, in 2 bytes, for 2 rows of 1000 tokens.
    assert found.kv_bytes == 2 * 1000 * 2 * 32 * 32 * 128 * 2
    assert (found.weights_bytes, found.caches_bytes) == (17 * 2, 35)
    assert found.total_bytes == found.kv_bytes + 17 * 2 + 35


def test_a_flat_config_is_read_too(tmp_path: Path) -> None:
    """Qwen2-VL's older checkpoints have no text_config."""
    config = {
        "model_type": "qwen2_vl",
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "max_position_embeddings": 700,
        "vision_config": {"depth": 2, "embed_dim": 16},
    }
    found = budget(checkpoint(tmp_path, config), SETTINGS, "float32")
    # The model's own 700 tokens bound a row; 3 layers, 2 heads of 8.
    assert found.kv_bytes == 2 * 700 * 2 * 3 * 2 * 8 * 4


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "nonsense"},
        {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": "x"}},
    ],
)
def test_a_config_of_no_known_model_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="config.json has no usable sizes"):
        budget(checkpoint(tmp_path, config), SETTINGS, "float32")


def test_a_directory_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="config.json has no usable sizes"):
        budget(tmp_path, SETTINGS, "float32")
