"""Loading a model's processor without torchvision, which only video needs.

Does not load weights (models.py).
"""

from typing import Any

from transformers import AutoConfig, AutoProcessor, ProcessorMixin, Qwen2VLProcessor


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


_IMAGE_ONLY = {"qwen2_vl": Qwen2VLImageOnlyProcessor, "qwen2_5_vl": Qwen2VLImageOnlyProcessor}


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
