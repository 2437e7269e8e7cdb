"""Messages and pictures -> token ids and tensors, by the model's own template and processor.

Runs in a thread pool beside the engine thread: it reads the model's configuration, never its
weights. Does not fetch or decode pictures (server/media.py).
"""

from collections.abc import Sequence
from typing import Any

import jinja2
from PIL import Image

from server.engine.families import Family, positions
from server.engine.types import EngineInputs, InputError


class InputBuilder:
    """Builds the inputs of one model; stateless after construction, so safe in many threads."""

    def __init__(self, family: Family, model: Any, processor: Any) -> None:
        self._family = family
        self._model = model
        self._processor = processor
        self._placeholders = tuple(
            token
            for name in ("image_token", "video_token")
            if (token := getattr(processor, name, None))
        )

    def build(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]
    ) -> EngineInputs:
        """See `Engine.prepare`. Raises InputError."""
        conversation = [self._normalised(message) for message in messages]
        try:
            prompt = self._processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the model's chat template refuses these messages: {error}") from None
        try:
            processed = self._processor(
                text=[prompt],
                images=list(images) or None,
                add_special_tokens=not self._starts_with_bos(prompt),
                return_tensors="pt",
            )
        except (ValueError, IndexError) as error:
            raise InputError(f"the model's processor refuses this prompt: {error}") from None
        token_ids = processed["input_ids"]
        position_ids, next_position = positions(
            self._family, self._model, token_ids, dict(processed)
        )
        image_token_id = self._model.config.image_token_id
        return EngineInputs(
            token_ids=tuple(token_ids[0].tolist()),
            image_tensors={n: processed[n] for n in self._family.image_tensors if n in processed},
            position_ids=position_ids,
            next_position=next_position,
            num_image_tokens=int((token_ids == image_token_id).sum()),
        )

    def _normalised(self, message: dict[str, Any]) -> dict[str, Any]:
        """Contents as part lists, which every vision template takes; no smuggled placeholders."""
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        for part in parts:
            for token in self._placeholders:
                if part["type"] == "text" and token in part["text"]:
                    raise InputError(f"the text contains {token!r}, which stands for a picture")
        return {**message, "content": parts}

    def _starts_with_bos(self, prompt: str) -> bool:
        """Whether the template has written the begin token itself, as most do."""
        bos = self._processor.tokenizer.bos_token
        return bos is not None and prompt.startswith(bos)
