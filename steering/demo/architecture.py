"""What the demonstration model is: its configuration, chat template and processor.

Used by training and by assembling alike. Holds no weights.
"""

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from steering.demo.pictures import SIZE

PATCH = 16
NUM_IMAGE_TOKENS = (SIZE // PATCH) ** 2
RANK = 16
SCALE = 2.0  # of an adapter's product; W + SCALE * B A
IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 15  # SmolLM2's "<jupyter_script>", renamed: no row is added to the vocabulary
RENAMED_TOKEN = "<jupyter_script>"
END_ID = 2  # <|im_end|>

# SmolLM2's format without its default system prompt; parts of a content list in any order.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') -%}"
    "{{- '<image>' -}}"
    "{%- elif part['type'] == 'text' -%}"
    "{{- part['text'] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

TOWER = CLIPVisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=SIZE,
    patch_size=PATCH,
    projection_dim=192,
)


def configuration() -> LlavaConfig:
    """SmolLM2-135M under a CLIP tower of 4 layers; 36 image tokens a picture."""
    language = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        bos_token_id=1,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=TOWER,
        text_config=language,
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=NUM_IMAGE_TOKENS,
        tie_word_embeddings=True,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )


def processor(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The whole picture, scaled to 96 x 96 and to -1..1; no torchvision."""
    images = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
