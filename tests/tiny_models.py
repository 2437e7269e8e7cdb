"""Real vision-language architectures, a few thousand parameters each, with real processors.

Built from a configuration with a fixed seed and nothing downloaded. They speak nonsense; what the
tests compare is arithmetic.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from steering.processors import Qwen2VLImageOnlyProcessor

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = (
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus the special tokens; 264 tokens in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
    )


def _text_sizes() -> dict[str, Any]:
    return {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "bos_token_id": None,
        "initializer_range": 0.3,
    }


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}


def build_tiny_llava(seed: int = 0) -> TinyModel:
    """CLIP + Llama as LLaVA-1.5: a 16 px picture is 4 tokens."""
    tokenizer = byte_tokenizer()
    ids = _token_ids(tokenizer)
    text = _text_sizes() | {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<pad>"]}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            initializer_range=0.3,
        ).to_dict(),
        text_config=LlamaConfig(**text).to_dict(),
        image_token_id=ids["<image>"],
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE.replace("IMAGE\n", "<image>\n"),
    )
    return TinyModel("llava", model, processor)


def build_tiny_qwen2_vl(seed: int = 0) -> TinyModel:
    """Qwen2-VL: dynamic resolution and M-RoPE, so positions differ from token indices."""
    tokenizer = byte_tokenizer()
    ids = _token_ids(tokenizer)
    text = _text_sizes() | {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<pad>"]}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    processor = Qwen2VLImageOnlyProcessor(
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
    return TinyModel("qwen2_vl", model, processor)
