"""Messages and pictures -> token ids and tensors, by the model's own template and processor.

Each picture goes through the processor alone, so that it can be encoded, cached and replaced
alone. Runs in a thread pool beside the engine thread: it reads the model's configuration, never
its weights. Does not fetch or decode pictures (server/media.py).
"""

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from server.engine.families import Family, image_token_id, positions
from server.engine.pictures import KEPT_BYTES, MeaninglessPictures, Picture
from server.engine.types import (
    EngineInputs,
    ImageInput,
    InputError,
    PairError,
    Prompt,
    ShiftPair,
)
from steering.corruption import MEANINGLESS, Corruption, corrupt, image_digest
from steering.processors import writes_its_own_bos

_OF_THE_TEXT = {
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "token_type_ids",
    "text_replacement_offsets",
}
_HTML_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]*>")


class InputBuilder:
    """Builds the inputs of one model; safe in many threads.

    All it remembers are the last meaningless pictures, up to `kept_bytes`: they come with
    every request of mode `sample`, and a size that was seen costs neither drawing, hashing nor the
    processor.
    """

    def __init__(
        self,
        family: Family,
        model: Any,
        processor: Any,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._family = family
        self._model = model
        self._processor = processor
        self._placeholder = image_token_id(model)
        self._image_token: str | None = getattr(processor, "image_token", None)
        self._control_tokens = _control_tokens(processor, self._placeholder)
        self._meaningless = MeaninglessPictures(kept_bytes)

    def build(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Image.Image],
        corruption: Corruption | None = None,
    ) -> EngineInputs:
        """See `Engine.prepare`. Raises InputError, and PairError where only the pair fails."""
        conversation = [self._checked(message) for message in messages]
        rendered = self._render(conversation)
        pictures = [self._read(image) for image in images]
        prompt = self._prompt(rendered, pictures)
        if corruption is None or not images:
            return EngineInputs(prompt)
        started = time.monotonic()
        try:
            corrupted = [self._corrupted(image, corruption) for image in images]
            pair = ShiftPair(
                self._replaced(prompt, pictures, corrupted),
                self._prompt(self._render(_without_pictures(conversation)), []),
            )
        except InputError as error:
            raise PairError(f"the request's own shift cannot be measured: {error}") from None
        if corruption in MEANINGLESS and self._begins_with_picture(rendered):
            shared = replace(pair.corrupted, shared_len=pair.corrupted.images[0].end)
            pair = replace(pair, corrupted=shared)
        return EngineInputs(prompt, pair, time.monotonic() - started)

    def _prompt(self, rendered: str, pictures: Sequence[Picture]) -> Prompt:
        """A rendered conversation with each image token expanded to its picture's tokens."""
        texts = [rendered] if self._image_token is None else rendered.split(self._image_token)
        if len(texts) - 1 != len(pictures):
            raise InputError(
                f"the messages came with {len(pictures)} pictures, but the model's chat template "
                f"made {len(texts) - 1} of them part of the prompt"
            )
        expanded = texts[0]
        for picture, text in zip(pictures, texts[1:], strict=True):
            expanded += picture.text + text
        token_ids = self._processor.tokenizer(
            expanded, add_special_tokens=not writes_its_own_bos(self._processor, rendered)
        )["input_ids"]
        if not token_ids:
            raise InputError("the prompt is empty")
        images = self._placed(token_ids, pictures)
        position_ids, next_position = positions(self._family, self._model, token_ids, images)
        return Prompt(tuple(token_ids), images, position_ids, next_position)

    def _placed(
        self, token_ids: Sequence[int], pictures: Sequence[Picture]
    ) -> tuple[ImageInput, ...]:
        """Each picture with its span, its placeholders counted off in order."""
        places = [i for i, token in enumerate(token_ids) if token == self._placeholder]
        expected = sum(picture.num_features for picture in pictures)
        if len(places) != expected:
            raise InputError(f"{len(places)} image placeholders in the prompt, not {expected}")
        images, first = [], 0
        for picture in pictures:
            last = first + picture.num_features - 1
            images.append(
                ImageInput(
                    digest=picture.digest,
                    tensors=picture.tensors,
                    start=places[first],
                    end=places[last] + 1,
                    num_features=picture.num_features,
                )
            )
            first = last + 1
        return tuple(images)

    def _read(self, image: Image.Image) -> Picture:
        """One picture through the processor."""
        if self._image_token is None:
            raise InputError(f"the processor of {self._family.name} names no image token")
        try:
            processed = self._processor(
                text=[self._image_token],
                images=[image],
                add_special_tokens=False,
                return_text_replacement_offsets=True,
                return_tensors="pt",
            )
        except (ValueError, IndexError) as error:
            raise InputError(f"the model's processor refuses this picture: {error}") from None
        replacements = processed.get("text_replacement_offsets")
        if not replacements:
            raise InputError(
                f"the processor of {self._family.name} does not say which tokens a picture becomes"
            )
        tensors = {name: processed[name] for name in processed.keys() - _OF_THE_TEXT}
        taken = self._family.image_tensors
        if taken and tensors.keys() != {*taken}:
            raise InputError(
                f"{self._family.name} is served with {', '.join(taken)} of its processor, which "
                f"made {', '.join(sorted(tensors))} of this picture"
            )
        num_features = int((processed["input_ids"] == self._placeholder).sum())
        if num_features == 0:
            raise InputError("the model's processor made no image token of this picture")
        text = str(replacements[0][0]["replacement"])
        return Picture(image_digest(image), tensors, text, num_features)

    def _corrupted(self, image: Image.Image, kind: Corruption) -> Picture:
        if kind not in MEANINGLESS:
            return self._read(corrupt(image, kind))
        kept = self._meaningless.get(kind, image.size)
        if kept is not None:
            return kept
        picture = self._read(corrupt(image, kind))
        # The digest is that of what the vision tower is given: where every blank picture becomes
        # the same tensors, whatever its size (LLaVA-1.5), all share one place in the caches.
        picture = replace(picture, digest=_tensor_digest(picture.tensors))
        self._meaningless.put(kind, image.size, picture)
        return picture

    def _replaced(self, prompt: Prompt, old: Sequence[Picture], new: Sequence[Picture]) -> Prompt:
        """The same prompt with other pictures in the same places."""
        if [picture.text for picture in old] != [picture.text for picture in new]:
            raise InputError("a corrupted picture does not become the same tokens as the picture")
        images = tuple(
            replace(image, digest=picture.digest, tensors=picture.tensors)
            for image, picture in zip(prompt.images, new, strict=True)
        )
        return replace(prompt, images=images)

    def _begins_with_picture(self, rendered: str) -> bool:
        """Whether nothing of the client's comes before the first picture.

        So it is when the template writes the same before the picture of any other conversation.
        """
        parts = [{"type": "image"}, {"type": "text", "text": "."}]
        try:
            other = self._render([{"role": "user", "content": parts}])
        except InputError:  # a template that asks for more than this
            return False
        return rendered.split(self._image_token)[0] == other.split(self._image_token)[0]

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


def _without_pictures(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation without its image parts; a message of pictures alone keeps an empty text,
    because templates look at a message's first part."""
    texts = [[p for p in message["content"] if p["type"] != "image"] for message in conversation]
    return [
        message | {"content": parts or [{"type": "text", "text": ""}]}
        for message, parts in zip(conversation, texts, strict=True)
    ]


def _tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, types, shapes and contents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _control_tokens(processor: Any, placeholder: int) -> tuple[str, ...]:
    """Tokens that a text must not smuggle in: picture placeholders, ends and begins of turns.

    Those that look like an HTML tag (<s>, </s>) stay allowed, because texts hold HTML; a
    placeholder never is.
    """
    names = ("image_token", "video_token")
    placeholders = [token for name in names if (token := getattr(processor, name, None))]
    placeholders.append(processor.tokenizer.convert_ids_to_tokens(placeholder))
    added = processor.tokenizer.added_tokens_decoder.values()
    special = [t.content for t in added if t.special and not _HTML_TAG.fullmatch(t.content)]
    return tuple(dict.fromkeys([*placeholders, *special]))
