"""What is asked: pictures and questions, of which no two are equal, so that no cache of a server
answers for the work that is measured. Does not send anything.
"""

import base64
import hashlib
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

QUESTIONS = (
    "What is in this picture?",
    "Describe the colours that you see.",
    "What stands in the middle?",
    "Where could this have been taken?",
    "Write a caption for this photograph.",
    "What is the largest thing here?",
    "What would you do with what you see?",
    "Tell a short story about this picture.",
)
FOLLOW_UP = "And what else do you see in the picture?"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CODE_LEN = 5
NUM_CODES = len(_LETTERS) ** _CODE_LEN
_SCATTER = 7_368_787  # prime to 26, so that n -> n * _SCATTER runs through every code
_BLOCK = 8  # pixels; a JPEG block
_SIZES = 64  # widths that new sizes go through before the height grows

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """Prompts by number. `first` is the run's own start, so that a server that another run has
    measured has not seen them; equal `first` and numbers give equal prompts.
    """

    image: Image.Image
    first: int = 0

    def code(self, number: int) -> str:
        """Five letters, another five for each of 26 ** 5 numbers; begins every question."""
        value = self._place(number) * _SCATTER % NUM_CODES
        letters = ""
        for _ in range(_CODE_LEN):
            value, digit = divmod(value, len(_LETTERS))
            letters += _LETTERS[digit]
        return letters

    def picture(self, number: int, *, new_size: bool = False) -> str:
        """The photograph as a data: URL, the number drawn in its corner as black and white blocks.

        new_size: a few pixels larger than the photograph, and of a size of this number's own.
        """
        picture = self.image.convert("RGB")
        if new_size:
            taller, wider = divmod(number, _SIZES)
            picture = picture.resize((picture.width + wider, picture.height + 1 + taller))
        place = self._place(number)
        draw = ImageDraw.Draw(picture)
        columns = max(1, picture.width // _BLOCK)
        for bit in range((NUM_CODES - 1).bit_length()):
            y, x = divmod(bit, columns)
            corner = (x * _BLOCK, y * _BLOCK)
            end = (corner[0] + _BLOCK - 1, corner[1] + _BLOCK - 1)
            draw.rectangle([corner, end], fill="white" if place >> bit & 1 else "black")
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=85)
        return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()

    def about_picture(
        self, number: int, question: int = 0, *, new_size: bool = False
    ) -> list[Message]:
        """One turn: a picture, then a question about it."""
        text = f"{self.code(number)}: {QUESTIONS[question % len(QUESTIONS)]}"
        url = self.picture(number, new_size=new_size)
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": text},
        ]
        return [{"role": "user", "content": content}]

    def text(self, number: int, num_words: int) -> list[Message]:
        """One turn without a picture, of `num_words` words."""
        words = " ".join(QUESTIONS).split()
        start = number % len(words)
        chosen = [words[(start + index) % len(words)] for index in range(num_words)]
        return [{"role": "user", "content": f"{self.code(number)}: {' '.join(chosen)}"}]

    @property
    def digest(self) -> str:
        """sha256 of the picture's pixels, its size and the questions."""
        content = repr((self.image.size, self.image.mode, QUESTIONS)).encode()
        return hashlib.sha256(content + self.image.tobytes()).hexdigest()

    def _place(self, number: int) -> int:
        return (self.first + number) % NUM_CODES
