"""Which model it is, and loading one: a vision-language model, its processor, their identity.

Covers digests that tell two models apart without reading every weight. Does not cover where the
decoder layers are (layers.py) nor running the model. transformers is imported on first use, so
that commands which only read vector sets start quickly.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from steering.errors import ModelError
from steering.layers import decoder_layers, text_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FILES_OF_A_CHECKPOINT = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_OTHER_COPIES = ("consolidated*", "original/*", "*/*")
_BLOCK_BYTES = 64 * 1024
_BLOCKS = 16


@dataclass(frozen=True)
class ModelIdentity:
    """What a vector set is tied to. Digests are sha256 in hex and hold no path of a machine.

    model_id and revision are names, for people; weights_digest is what tells models apart.
    dtype is what the weights were run in; quantisation the checkpoint's method, None for none.
    """

    model_id: str
    revision: str | None
    weights_digest: str
    dtype: str
    quantisation: str | None
    processor_digest: str
    chat_template_digest: str
    num_layers: int
    hidden_size: int


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode without gradients, its processor and their identity."""

    model: Any
    processor: Any
    identity: ModelIdentity


def load_model(
    model: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto"
) -> LoadedModel:
    """Load a vision-language model from a local directory or a hub id.

    dtype: auto, float32, bfloat16 or float16; auto is `default_dtype` of the device. device:
    auto, cpu, cuda or cuda:N; auto is the GPU where there is one. Weights are read from
    safetensors files only. Raises ModelError, with what to change.
    """
    place = device_of(device)
    directory, model_id, commit = _checkpoint(model, revision)
    _refuse_text_only(directory, model)
    chosen = default_dtype(place) if dtype == "auto" else _dtype(dtype)
    loaded, processor = _read(directory, chosen, model)
    chat_template_digest(processor, model)
    loaded = loaded.to(place).eval().requires_grad_(False)
    return LoadedModel(
        loaded,
        processor,
        identity_of(
            loaded,
            processor,
            model_id=model_id,
            revision=commit,
            weights_digest=directory_digest(directory),
        ),
    )


def _read(directory: Path, dtype: torch.dtype, name: str) -> tuple[Any, Any]:
    """The model, on the CPU, and its processor. name: what errors call them by."""
    from transformers import AutoModelForImageTextToText

    from steering.processors import load_processor

    try:
        processor = load_processor(str(directory))
        loaded, found = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{name}: cannot be loaded: {_first_line(error)}") from error
    if found["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(found["missing_keys"])
        raise ModelError(f"{name}: {len(missing)} weights are missing, first {missing[0]}")
    return loaded, processor


def identity_of(
    model: Any,
    processor: Any,
    *,
    model_id: str,
    revision: str | None = None,
    weights_digest: str | None = None,
) -> ModelIdentity:
    """The identity of a model in memory.

    Without a weights_digest (a checkpoint's, `directory_digest`) one is computed from every
    weight: for small models, and different for each dtype.
    """
    config = text_config(model)
    quantisation = getattr(model.config, "quantization_config", None)
    if quantisation is not None and not isinstance(quantisation, dict):
        quantisation = quantisation.to_dict()
    return ModelIdentity(
        model_id=model_id,
        revision=revision,
        weights_digest=weights_digest or state_digest(model),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        quantisation=None if quantisation is None else str(quantisation.get("quant_method")),
        processor_digest=processor_digest(processor),
        chat_template_digest=chat_template_digest(processor, model_id),
        num_layers=len(decoder_layers(model)),
        hidden_size=int(config.hidden_size),
    )


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def directory_digest(directory: Path) -> str:
    """A digest of a checkpoint that is cheap for any size and changes with a retraining.

    Covers config.json without names and versions, and of each weights file its name, size,
    safetensors header and 16 evenly spaced blocks of 64 KiB.
    """
    digest = hashlib.sha256()
    config = json.loads((directory / "config.json").read_text())
    digest.update(_canonical(_without(config, ("_name_or_path", "transformers_version"))))
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{directory.name}: no *.safetensors file; other formats are not read")
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            header_len = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header_len))
            for block in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def state_digest(model: nn.Module) -> str:
    """A digest of every weight's name, shape, dtype and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def processor_digest(processor: Any) -> str:
    """A digest of the tokenizer and of the image settings, not of which backend runs them."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        words: Any = sorted(tokenizer.get_vocab().items())
    else:
        words = _without(json.loads(backend.to_str()), ("padding", "truncation"))
    image = processor.image_processor.to_dict()
    settings = {
        key: value
        for key, value in image.items()
        if value is not None and not key.startswith("_") and key not in _BACKEND_KEYS
    }
    expansion = {key: getattr(processor, key, None) for key in _EXPANSION_KEYS}
    lengths = {key: getattr(processor, key, None) for key in _LENGTH_KEYS}
    expansion |= {key: length for key, length in lengths.items() if length is not None}
    return hashlib.sha256(_canonical([words, settings, expansion])).hexdigest()


_BACKEND_KEYS = (
    "processor_class",
    "image_processor_type",
    "feature_extractor_type",
    "device",
    "data_format",
    "input_data_format",
    "return_tensors",
    "disable_grouping",
)
_LENGTH_KEYS = ("image_seq_len", "image_seq_length")  # Idefics3 and SmolVLM; Gemma 3
_EXPANSION_KEYS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


def chat_template_digest(processor: Any, name: str = "the model") -> str:
    """sha256 of the chat template's text. Raises ModelError where there is none."""
    template = getattr(processor, "chat_template", None)
    if template is None:
        template = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str) or not template:
        raise ModelError(
            f"{name}: the processor has no chat template, so no prompt can be built; "
            "add a chat_template.jinja to the checkpoint"
        )
    return hashlib.sha256(template.encode()).hexdigest()


def device_of(device: str) -> torch.device:
    """auto, cpu, cuda or cuda:N -> the device itself. Raises ModelError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is not one of: auto, cpu, cuda, cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: this PyTorch sees no GPU; use cpu or auto")
    return place


def _dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _checkpoint(model: str, revision: str | None) -> tuple[Path, str, str | None]:
    """(local directory, model id, revision); downloads a hub id."""
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(f"{model}: a local directory has no revision; leave out --revision")
        if not (path / "config.json").is_file():
            raise ModelError(f"{model}: no config.json in this directory")
        return path, path.resolve().name, None
    if path.exists() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"{model}: no such directory")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> tuple[Path, str, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        directory = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(_FILES_OF_A_CHECKPOINT),
            ignore_patterns=list(_OTHER_COPIES),
        )
    except GatedRepoError as error:
        raise ModelError(f"{model}: gated; accept its licence on the hub, set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{model}: the hub has no revision {revision!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"{model}: neither a directory nor a model on the hub") from error
    except Exception as error:  # the hub client raises several libraries' network errors
        raise ModelError(
            f"{model}: no such directory, and the hub cannot be reached ({_first_line(error)}); "
            "give a local directory or a model that is in the hub cache"
        ) from error
    if not (Path(directory) / "config.json").is_file():
        raise ModelError(f"{model}: no config.json in this repository")
    return Path(directory), model, Path(directory).name


def _refuse_text_only(directory: Path, model: str) -> None:
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model}: config.json: {_first_line(error)}") from error
    takes_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not takes_images or not hasattr(config, "vision_config"):
        raise ModelError(
            f"{model}: a {config.model_type!r} model takes no images; steering needs a "
            "vision-language model"
        )


def _without(values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
