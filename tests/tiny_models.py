"""Real vision-language architectures, a few thousand parameters each, with real processors.

Built from a configuration with a fixed seed and nothing downloaded. They speak nonsense; what the
tests compare is arithmetic. Sizes are such that ordinary test pictures are cut into tiles
(LLaVA-NeXT, Idefics3, SmolVLM), have a resolution of their own (Qwen) or are longer than an
attention window (Gemma 3, Qwen2.5-VL's tower).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from steering.processors import Qwen2VLImageOnlyProcessor, SmolVLMImageOnlyProcessor
from tests.tiny_tokenizers import (
    CHAT_TEMPLATE,
    GEMMA_TEMPLATE,
    GEMMA_TOKENS,
    PICTURES_FIRST_TEMPLATE,
    TILE_TOKENS,
    TILES_TEMPLATE,
    byte_tokenizer,
)


@dataclass(frozen=True)
class TinyModel:
    """`model` in eval mode, float32, on the CPU; `processor` with tokenizer and chat template."""

    name: str
    model: Any
    processor: Any

    def save(self, directory: Path) -> Path:
        """Write a checkpoint directory that `transformers` loads as it stands."""
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)
        return directory


def _text_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "initializer_range": 0.3,
    }


def _llama(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return LlamaConfig(**_text_sizes(tokenizer)).to_dict()


def _clip_tower() -> dict[str, Any]:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        initializer_range=0.3,
    ).to_dict()


def _siglip_tower(image_size: int) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 4,
    }


def _tiny(
    name: str,
    model_class: Callable[[Any], Any],
    config: Any,
    processor: Any,
    seed: int,
    *,
    spread: float | None = None,
) -> TinyModel:
    """spread: scale of the weights of a tower whose own initialisation would hide its pictures."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    if spread is not None:
        decoder = {id(parameter) for parameter in model.get_decoder().parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                if id(parameter) not in decoder and parameter.dim() > 1:
                    parameter.normal_(std=spread)
    return TinyModel(name, model, processor)


def build_tiny_llava(seed: int = 0) -> TinyModel:
    """CLIP + Llama as LLaVA-1.5: a picture is 4 tokens."""
    tokenizer = byte_tokenizer()
    config = LlavaConfig(
        vision_config=_clip_tower(),
        text_config=_llama(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    processor = _llava_processor(tokenizer, CHAT_TEMPLATE.replace("IMAGE\n", "<image>\n"))
    return _tiny("llava", LlavaForConditionalGeneration, config, processor, seed)


def _llava_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=template,
    )


def build_tiny_llava_next(seed: int = 0) -> TinyModel:
    """LLaVA-NeXT: 16 px tiles, as many as the picture's shape asks for, and a token a line."""
    tokenizer = byte_tokenizer()
    grid = [[16, 32], [32, 16], [32, 32], [16, 48]]
    config = LlavaNextConfig(
        vision_config=_clip_tower(),
        text_config=_llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=grid,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 16},
            crop_size={"height": 16, "width": 16},
            image_grid_pinpoints=grid,
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=PICTURES_FIRST_TEMPLATE,
    )
    return _tiny("llava_next", LlavaNextForConditionalGeneration, config, processor, seed)


def build_tiny_idefics3(seed: int = 0) -> TinyModel:
    """Idefics3: up to 2 x 2 tiles of 16 px and the whole, 4 tokens each, and tokens between."""
    return _tiled(
        "idefics3",
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        seed,
    )


def build_tiny_smolvlm(seed: int = 0) -> TinyModel:
    """SmolVLM: as Idefics3."""
    return _tiled(
        "smolvlm",
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessorPil,
        SmolVLMImageOnlyProcessor,
        seed,
    )


def _tiled(
    name: str,
    config_class: Any,
    model_class: Any,
    image_processor_class: Any,
    processor_class: Any,
    seed: int,
) -> TinyModel:
    tokenizer = byte_tokenizer(TILE_TOKENS)
    config = config_class(
        vision_config=_siglip_tower(image_size=16),
        text_config=_llama(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    processor = processor_class(
        image_processor=image_processor_class(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=TILES_TEMPLATE,
    )
    return _tiny(name, model_class, config, processor, seed, spread=0.3)


def _qwen_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLImageOnlyProcessor:
    return Qwen2VLImageOnlyProcessor(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=4,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 64, "longest_edge": 4096},
        ),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE.replace(
            "IMAGE\n", "<|vision_start|><|image_pad|><|vision_end|>"
        ),
    )


def _qwen_config(
    config_class: Any, tokenizer: PreTrainedTokenizerFast, tower: dict[str, Any]
) -> Any:
    text = _text_sizes(tokenizer)
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    shared = {
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    return config_class(
        text_config=text,
        vision_config=shared | tower,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )


def build_tiny_qwen2_vl(seed: int = 0) -> TinyModel:
    """Qwen2-VL: dynamic resolution and M-RoPE, so positions differ from token indices."""
    tokenizer = byte_tokenizer()
    tower = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    config = _qwen_config(Qwen2VLConfig, tokenizer, tower)
    processor = _qwen_processor(tokenizer)
    return _tiny("qwen2_vl", Qwen2VLForConditionalGeneration, config, processor, seed)


def build_tiny_qwen2_5_vl(seed: int = 0) -> TinyModel:
    """Qwen2.5-VL: as Qwen2-VL, with a tower of which one layer sees windows of 16 px."""
    tokenizer = byte_tokenizer()
    tower = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 24,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = _qwen_config(Qwen2_5_VLConfig, tokenizer, tower)
    processor = _qwen_processor(tokenizer)
    return _tiny(
        "qwen2_5_vl", Qwen2_5_VLForConditionalGeneration, config, processor, seed, spread=0.3
    )


def build_tiny_gemma3(seed: int = 0) -> TinyModel:
    """Gemma 3: 9 tokens a picture that see each other, and one layer of three without a window.

    The window, 48 tokens, is shorter than most prompts of the tests, but lets the last token of a
    short one see its picture in the first layer already: else that layer's shift is only rounding.
    The placeholder lies outside the vocabulary of the embeddings.
    """
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = byte_tokenizer(GEMMA_TOKENS, **named)
    placeholder = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    assert placeholder == len(tokenizer) - 1
    config = Gemma3Config(
        vision_config=_siglip_tower(image_size=24) | {"vision_use_head": False},
        text_config=_text_sizes(tokenizer)
        | {
            "vocab_size": placeholder,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 48,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        mm_tokens_per_image=9,
        image_token_index=placeholder,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 24, "width": 24}),
        tokenizer=tokenizer,
        image_seq_length=9,
        chat_template=GEMMA_TEMPLATE,
    )
    return _tiny("gemma3", Gemma3ForConditionalGeneration, config, processor, seed, spread=0.3)


def build_tiny_unlisted(seed: int = 0) -> TinyModel:
    """ViP-LLaVA, a family that is not listed: features of two tower layers side by side."""
    tokenizer = byte_tokenizer()
    config = VipLlavaConfig(
        vision_config=_clip_tower(),
        text_config=_llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=[-1, -2],
    )
    processor = _llava_processor(tokenizer, CHAT_TEMPLATE.replace("IMAGE\n", "<image>\n"))
    return _tiny("vipllava", VipLlavaForConditionalGeneration, config, processor, seed)


BUILDERS: dict[str, Callable[[], TinyModel]] = {
    "llava": build_tiny_llava,
    "llava_next": build_tiny_llava_next,
    "idefics3": build_tiny_idefics3,
    "smolvlm": build_tiny_smolvlm,
    "qwen2_vl": build_tiny_qwen2_vl,
    "qwen2_5_vl": build_tiny_qwen2_5_vl,
    "gemma3": build_tiny_gemma3,
}
