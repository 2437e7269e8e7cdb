"""Processors as a checkpoint on the hub names them, loaded without what only video needs."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from steering.processors import load_processor
from tests.tiny_models import TinyModel

IMAGE = Image.linear_gradient("L").resize((48, 20)).convert("RGB")


@pytest.fixture
def checkpoint(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """Its image processor named as on the hub, by the class that requires torchvision."""
    directory = tiny_model.save(tmp_path / "checkpoint")
    path = directory / "processor_config.json"
    config = json.loads(path.read_text())
    image = config["image_processor"]
    image["image_processor_type"] = image["image_processor_type"].removesuffix("Pil")
    hub_names = {"smolvlm": "SmolVLMProcessor", "qwen2_vl": "Qwen2VLProcessor"}
    hub_names["qwen2_5_vl"] = "Qwen2_5_VLProcessor"
    config["processor_class"] = hub_names.get(tiny_model.name, config["processor_class"])
    path.write_text(json.dumps(config))
    return directory


def test_a_loaded_processor_makes_the_same_tokens_and_tensors(
    tiny_model: TinyModel, checkpoint: Path
) -> None:
    loaded = load_processor(str(checkpoint))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]

    def outputs(processor: Any) -> dict[str, Any]:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        return dict(processor(text=[text], images=[IMAGE], return_tensors="pt"))

    one, other = outputs(loaded), outputs(tiny_model.processor)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].equal(other[name]), name
