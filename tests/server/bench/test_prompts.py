"""No two prompts alike; the same sizes and lengths where they are to be compared."""

import base64
import io

from PIL import Image

from server.bench.prompts import NUM_CODES, Prompts
from steering.corruption import image_digest

PROMPTS = Prompts(Image.new("RGB", (48, 32), "teal"), first=7)


def decoded(url: str) -> Image.Image:
    data = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_every_picture_differs_after_decoding_and_has_the_same_size() -> None:
    """JPEG blurs: colours that differ by a little may come back equal, blocks do not."""
    pictures = [decoded(PROMPTS.picture(number)) for number in range(200)]
    assert len({image_digest(picture) for picture in pictures}) == 200
    assert {picture.size for picture in pictures} == {(48, 32)}


def test_new_sizes_are_all_different_and_a_little_larger() -> None:
    sizes = [decoded(PROMPTS.picture(number, new_size=True)).size for number in range(150)]
    assert len(set(sizes)) == 150
    assert all(48 <= width < 48 + 64 and 32 < height <= 35 for width, height in sizes)


def test_every_text_begins_with_a_code_of_its_own() -> None:
    codes = {PROMPTS.code(number) for number in range(5000)}
    assert len(codes) == 5000 and {len(code) for code in codes} == {5}
    one, two = (PROMPTS.about_picture(n, 3)[0]["content"][1]["text"] for n in (0, 1))
    assert one != two and one.split(": ")[1] == two.split(": ")[1]
    assert PROMPTS.code(0) == PROMPTS.code(NUM_CODES)


def test_equal_numbers_give_equal_prompts_and_another_run_begins_elsewhere() -> None:
    assert PROMPTS.about_picture(4) == PROMPTS.about_picture(4)
    later = Prompts(PROMPTS.image, first=8)
    assert later.about_picture(4) == PROMPTS.about_picture(5)
    assert later.about_picture(4) != PROMPTS.about_picture(4)


def test_a_text_has_as_many_words_as_asked() -> None:
    [message] = PROMPTS.text(3, 250)
    assert len(message["content"].split()) == 251  # and the code
