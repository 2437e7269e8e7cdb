"""Messages and pictures -> token ids and tensors, by the model's own template and processor.

Runs in a thread pool beside the engine thread: it reads the model's configuration, never its
weights. Does not fetch or decode pictures (server/media.py).
"""

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from server.engine.families import Family, positions
from server.engine.types import EngineInputs, InputError
from steering.processors import writes_its_own_bos

_EVERY_FAMILY = {"input_ids", "attention_mask", "mm_token_type_ids"}
_HTML_TAG = re.compile(r"</?\w+>")


class InputBuilder:
    """Builds the inputs of one model; stateless after construction, so safe in many threads."""

    def __init__(self, family: Family, model: Any, processor: Any) -> None:
        self._family = family
        self._model = model
        self._processor = processor
        self._control_tokens = _control_tokens(processor)

    def build(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]
    ) -> EngineInputs:
        """See `Engine.prepare`. Raises InputError."""
        prompt = self._render([self._checked(message) for message in messages])
        try:
            processed = self._processor(
                text=[prompt],
                images=list(images) or None,
                add_special_tokens=not writes_its_own_bos(self._processor, prompt),
                return_tensors="pt",
            )
        except (ValueError, IndexError) as error:
            raise InputError(f"the model's processor refuses this prompt: {error}") from None
        if unknown := processed.keys() - _EVERY_FAMILY - {*self._family.image_tensors}:
            raise InputError(
                f"{self._family.name} is served without what its processor made of this prompt: "
                + ", ".join(sorted(unknown))
            )
        token_ids = processed["input_ids"]
        if token_ids.shape[1] == 0:
            raise InputError("the prompt is empty")
        position_ids, next_position = positions(
            self._family, self._model, token_ids, dict(processed)
        )
        return EngineInputs(
            token_ids=tuple(token_ids[0].tolist()),
            image_tensors={n: processed[n] for n in self._family.image_tensors if n in processed},
            position_ids=position_ids,
            next_position=next_position,
        )

    def _checked(self, message: dict[str, Any]) -> dict[str, Any]:
        """Contents as part lists, which vision templates take; no control tokens in texts."""
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        for part in parts:
            for token in self._control_tokens:
                if part["type"] == "text" and token in part["text"]:
                    raise InputError(f"the text contains {token!r}, a control token of this model")
        return {**message, "content": parts}

    def _render(self, conversation: list[dict[str, Any]]) -> str:
        """The prompt by the chat template. Templates are programs: they may raise anything."""
        forms = [conversation]
        if all(part["type"] == "text" for message in conversation for part in message["content"]):
            # Some templates take plain strings only.
            texts = ["".join(p["text"] for p in message["content"]) for message in conversation]
            forms.append(
                [m | {"content": text} for m, text in zip(conversation, texts, strict=True)]
            )
        for form in forms:
            try:
                return str(
                    self._processor.apply_chat_template(
                        form, add_generation_prompt=True, tokenize=False
                    )
                )
            except Exception as error:
                refusal = error
        raise InputError(f"the model's chat template refuses these messages: {refusal}")


def _control_tokens(processor: Any) -> tuple[str, ...]:
    """Tokens that a text must not smuggle in: picture placeholders, ends and begins of turns.

    Those that look like an HTML tag (<s>, </s>) stay allowed, because texts hold HTML; a
    placeholder never is.
    """
    names = ("image_token", "video_token")
    placeholders = [token for name in names if (token := getattr(processor, name, None))]
    added = processor.tokenizer.added_tokens_decoder.values()
    special = [t.content for t in added if t.special and not _HTML_TAG.fullmatch(t.content)]
    return tuple(dict.fromkeys([*placeholders, *special]))
