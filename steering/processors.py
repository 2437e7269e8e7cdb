"""Loading a model's processor without torchvision and num2words, which only video needs.

Does not load weights (models.py).
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoProcessor,
    ProcessorMixin,
    Qwen2VLProcessor,
    SmolVLMProcessor,
)


class Qwen2VLImageOnlyProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor for text and pictures; its video part requires torchvision."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        **_: Any,
    ) -> None:
        self.image_token = "<|image_pad|>"
        self.video_token = "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class SmolVLMImageOnlyProcessor(SmolVLMProcessor):
    """SmolVLM's processor for text and pictures; its video part requires both libraries."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_len: int = 169,
        chat_template: Any = None,
        **_: Any,
    ) -> None:
        self.image_seq_len = image_seq_len
        self.image_token = getattr(tokenizer, "image_token", "<image>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.fake_image_token = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
        self.global_image_token = getattr(tokenizer, "global_image_token", "<global-img>")
        self.video_token = None
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    # SmolVLM's own reads the video part's settings.
    apply_chat_template = ProcessorMixin.apply_chat_template

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


_IMAGE_ONLY = {
    "qwen2_vl": Qwen2VLImageOnlyProcessor,
    "qwen2_5_vl": Qwen2VLImageOnlyProcessor,
    "smolvlm": SmolVLMImageOnlyProcessor,
}


def load_processor(model: str, revision: str | None = None) -> Any:
    """The processor of a local directory or hub id, pictures and text only.

    Raises what transformers raises (OSError, ValueError); `load_model` words it for a person.
    """
    model_type = AutoConfig.from_pretrained(model, revision=revision).model_type
    return _IMAGE_ONLY.get(model_type, AutoProcessor).from_pretrained(model, revision=revision)


def writes_its_own_bos(processor: Any, prompt: str) -> bool:
    """Whether the chat template has written the begin token itself, so that none is to be added."""
    bos = processor.tokenizer.bos_token
    return bos is not None and prompt.startswith(bos)
