"""Models of a known shape with random weights: what a request costs does not depend on the values.

Built on this machine, nothing downloaded: weights from a fixed seed, a tokenizer of whole words, a
processor, and random shift vectors. They speak nonsense, and what they say must not be judged.
"""

import datetime
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from server.bench.prompts import FOLLOW_UP, QUESTIONS
from steering.demo.architecture import CHAT_TEMPLATE, IMAGE_TOKEN
from steering.hooks import record
from steering.layers import decoder_layers
from steering.models import ModelIdentity, directory_digest, identity_of
from steering.vectors import Manifest, ShiftVectors

ALIAS = "bench"
ALPHA = 0.01  # with vectors as long as the hidden states: a relative dose of 1 %
_SPECIAL_TOKENS = ("<pad>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN)
_UNKNOWN = "?"


@dataclass(frozen=True)
class Shape:
    """LLaVA-1.5's architecture in numbers: CLIP's tower, a projector of two layers, Llama.

    `image_size` and `patch_size` are pixels; a picture is (image_size // patch_size) ** 2 tokens.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    tower_layers: int
    tower_size: int
    tower_heads: int
    image_size: int = 336
    patch_size: int = 14
    max_len: int = 8192
    seed: int = 0


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llava-0.5b", 32, 960, 15, 5, 2560, 49152, True, 12, 768, 12),
        Shape("llava-1.5-7b", 32, 4096, 32, 32, 11008, 32000, False, 24, 1024, 16, max_len=4096),
    )
}


@dataclass(frozen=True)
class Built:
    """Where a shape's checkpoint and its shift vectors are."""

    model: Path
    vectors: Path


def build(shape: Shape, cache: Path, device: str = "auto") -> Built:
    """The shape's checkpoint in bfloat16 within `cache`, made where it is missing or of other
    numbers. device: where the weights are drawn, auto is the GPU where there is one; each kind of
    device draws others from the same seed.
    """
    folder = cache / "shapes" / shape.name
    built = Built(folder / "model", folder / "vectors.safetensors")
    finished = folder / "shape.json"  # written last
    wanted = json.dumps(asdict(shape))
    if finished.is_file() and finished.read_text() == wanted:
        return built
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = _processor(shape)
    model = _model(shape, processor.tokenizer, torch.device(device))
    model.save_pretrained(built.model)
    processor.save_pretrained(built.model)
    digest = directory_digest(built.model)
    identity = identity_of(model, processor, model_id=shape.name, weights_digest=digest)
    _vectors(model, identity, shape.seed).save(built.vectors)
    finished.write_text(wanted)
    return built


def _model(shape: Shape, tokenizer: Any, device: torch.device) -> Any:
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(shape.seed)
    with device:  # weights are drawn in bfloat16 where they stay: no second copy
        model = LlavaForConditionalGeneration._from_config(
            configuration(shape, tokenizer), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    special = [tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL_TOKENS]
    with torch.no_grad():  # a logit of 0 is never the largest: no token without text is chosen
        model.get_output_embeddings().weight[special] = 0
    return model.eval()


def configuration(shape: Shape, tokenizer: Any) -> Any:
    """transformers' LlavaConfig, the token ids by `tokenizer`."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_len,
        tie_word_embeddings=shape.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tower = CLIPVisionConfig(
        num_hidden_layers=shape.tower_layers,
        hidden_size=shape.tower_size,
        num_attention_heads=shape.tower_heads,
        intermediate_size=4 * shape.tower_size,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(shape.image_size // shape.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=shape.tie_word_embeddings,
    )


def build_tokenizer(vocab_size: int) -> Any:
    """One token for each word that the bench asks with and for each printable character, made-up
    words for the rest. Every token has a text of its own, which is read back as that token: an
    answer has as many tokens in the next turn as it had when it was generated.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template_words = ("user", "assistant", "system")
    asked = " ".join([*QUESTIONS, FOLLOW_UP, *template_words]).replace("?", "").replace(".", "")
    pieces = [_UNKNOWN, *(chr(code) for code in range(33, 127) if chr(code) != _UNKNOWN), "\n", "▁"]
    pieces += sorted({f"▁{word}" for word in asked.replace(",", "").split()} | set(template_words))
    num_made_up = vocab_size - len(_SPECIAL_TOKENS) - len(pieces)
    pieces += [f"▁w{index:05d}" for index in range(num_made_up)]
    # Equal scores: the fewest pieces win.
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", IMAGE_TOKEN],
    )


def _processor(shape: Shape) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"shortest_edge": shape.image_size},
        crop_size={"height": shape.image_size, "width": shape.image_size},
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(shape.vocab_size),
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def _vectors(model: Any, identity: ModelIdentity, seed: int) -> ShiftVectors:
    """Random directions, each as long as the layer's hidden state of a short prompt."""
    layers = decoder_layers(model)
    ids = torch.arange(8, 16, device=model.device)[None]
    with record(layers) as recorder, torch.inference_mode():
        model(input_ids=ids)
    norm = recorder.last_hidden()[:, 0].norm(dim=-1).cpu()  # (L,)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(len(layers), identity.hidden_size, generator=generator)
    direction /= direction.norm(dim=-1, keepdim=True)
    manifest = Manifest(
        model=identity,
        corruption="blank",
        image_size="1x1",
        anchor_set="none: random directions",
        anchor_set_digest="",
        num_anchors=0,
        versions=(("torch", torch.__version__),),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return ShiftVectors(
        manifest=manifest,
        mean=direction * norm[:, None],
        hidden_norm=norm,
        consistency=torch.ones(len(layers)),
    )
