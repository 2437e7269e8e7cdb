"""Loading models and telling them apart."""

import copy
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steering.errors import ModelError
from steering.models import default_dtype, directory_digest, identity_of, load_model
from tests.tiny_models import TinyModel


@pytest.fixture(scope="module")
def saved(tiny_llava: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.save(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def test_a_saved_model_loads_ready_to_run_with_the_identity_it_has_in_memory(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    loaded = load_model(str(tiny_model.save(tmp_path / "tiny")), dtype="float32", device="cpu")
    in_memory = identity_of(tiny_model.model, tiny_model.processor, model_id="tiny")
    assert loaded.identity.processor_digest == in_memory.processor_digest
    assert loaded.identity.chat_template_digest == in_memory.chat_template_digest
    assert (loaded.identity.num_layers, loaded.identity.hidden_size) == (3, 32)
    assert (loaded.identity.model_id, loaded.identity.revision) == ("tiny", None)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    ids = torch.arange(10)[None]
    assert torch.equal(
        loaded.model(input_ids=ids).logits, tiny_model.model(input_ids=ids).logits.detach()
    )


def test_using_the_processor_does_not_change_its_digest(tiny_model: TinyModel) -> None:
    processor = copy.deepcopy(tiny_model.processor)  # its tokenizer remembers the truncation
    before = identity_of(tiny_model.model, processor, model_id="x")
    processor(text=["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert identity_of(tiny_model.model, processor, model_id="x") == before


def test_no_path_of_the_machine_is_in_the_identity(saved: Path) -> None:
    assert str(saved.parent) not in repr(load_model(str(saved)).identity)
    assert load_model(f"{saved}/").identity.model_id == "tiny-llava"


def test_the_dtype_is_the_one_asked_for_and_auto_follows_the_hardware(saved: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        loaded = load_model(str(saved), dtype=dtype, device="cpu")
        assert loaded.identity.dtype == dtype
        assert next(loaded.model.parameters()).dtype == getattr(torch, dtype)
    automatic = default_dtype(torch.device("cpu"))
    assert automatic in (torch.bfloat16, torch.float32)
    assert load_model(str(saved), device="cpu").model.dtype == automatic


def test_the_weights_digest_is_the_same_for_a_copy_in_any_dtype(
    saved: Path, checkpoint: Path
) -> None:
    assert (
        load_model(str(saved), dtype="bfloat16").identity.weights_digest
        == load_model(str(checkpoint), dtype="float32").identity.weights_digest
    )


def test_the_weights_digest_follows_one_weight_and_the_config(
    saved: Path, checkpoint: Path
) -> None:
    original = directory_digest(saved)
    weights = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    retrained = directory_digest(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"image_seq_length": 5}))
    assert len({original, retrained, directory_digest(checkpoint)}) == 3


def test_the_config_may_name_another_path_and_version(saved: Path, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"_name_or_path": "/somewhere", "transformers_version": "9"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert directory_digest(checkpoint) == directory_digest(saved)


def test_another_chat_template_and_tokenizer_change_their_digests(
    saved: Path, checkpoint: Path
) -> None:
    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    settings = checkpoint / "processor_config.json"
    config = json.loads(settings.read_text())
    config["image_processor"]["image_mean"] = [0.0, 0.0, 0.0]
    settings.write_text(json.dumps(config))
    one, other = load_model(str(saved)).identity, load_model(str(checkpoint)).identity
    assert one.chat_template_digest != other.chat_template_digest
    assert one.processor_digest != other.processor_digest
    assert one.weights_digest == other.weights_digest


def test_the_in_memory_digest_follows_one_weight(tiny_llava: TinyModel) -> None:
    def digest() -> str:
        identity = identity_of(tiny_llava.model, tiny_llava.processor, model_id="x")
        return identity.weights_digest

    before = digest()
    weight = next(tiny_llava.model.parameters()).data.view(-1)
    value = weight[0].item()
    weight[0] += 1
    changed = digest()
    weight[0] = value
    assert (changed != before, digest()) == (True, before)


@pytest.mark.parametrize("model", ["./none", "/none/at/all", "~/none/at/all", "a/b/c"])
def test_a_missing_directory_is_refused_as_one(model: str) -> None:
    with pytest.raises(ModelError, match=f"{model}: no such directory$"):
        load_model(model)


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="deshift-tests/none: .* hub cannot be reached"):
        load_model("deshift-tests/none")


def test_an_empty_directory_and_one_without_weights_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded: .*safetensors"):
        load_model(str(checkpoint))


def test_damaged_weights_and_config_are_refused_in_one_line(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelError) as refused:
        load_model(str(checkpoint))
    assert "\n" not in str(refused.value)
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(str(checkpoint))


def test_a_checkpoint_with_a_weight_missing_is_refused_by_its_name(checkpoint: Path) -> None:
    """transformers fills it with random numbers and goes on."""
    tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
    del tensors[name]
    safetensors.torch.save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, first .*layers\.1\.mlp\.up_proj"):
        load_model(str(checkpoint))


def test_a_text_only_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match="'llama' model takes no images"):
        load_model(str(tmp_path / "llama"))


def test_a_processor_without_chat_template_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_model(str(checkpoint))


def test_wrong_settings_are_refused_before_anything_is_loaded(saved: Path) -> None:
    with pytest.raises(ModelError, match="'int8' is not one of: auto, float32"):
        load_model(str(saved), dtype="int8")
    with pytest.raises(ModelError, match="'gpu' is not one of"):
        load_model(str(saved), device="gpu")
    with pytest.raises(ModelError, match="has no revision"):
        load_model(str(saved), revision="main")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="sees no GPU"):
            load_model(str(saved), device="cuda:0")
