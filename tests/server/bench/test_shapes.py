"""Shapes: the same code with small numbers builds a model that loads, sees and speaks."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from server.bench import shapes
from server.bench.footprint import budget
from server.bench.generate import Generated
from server.bench.prompts import QUESTIONS, Prompts
from server.config import Settings
from steering.models import LoadedModel, load_model
from steering.ops import dose
from steering.vectors import ShiftVectors

TOY = shapes.Shape(
    "toy",
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    vocab_size=600,
    tie_word_embeddings=True,
    tower_layers=2,
    tower_size=16,
    tower_heads=2,
    image_size=28,
    max_len=512,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> shapes.Built:
    return shapes.build(TOY, tmp_path_factory.mktemp("cache"), "cpu")


@pytest.fixture(scope="module")
def loaded(built: shapes.Built) -> LoadedModel:
    return load_model(str(built.model), dtype="float32", device="cpu")


def test_it_answers_a_prompt_with_a_picture_in_tokens_that_all_have_a_text(
    loaded: LoadedModel,
) -> None:
    content = [{"type": "image"}, {"type": "text", "text": f"qwert: {QUESTIONS[0]}"}]
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    picture = Image.new("RGB", (40, 30), "teal")
    inputs = loaded.processor(text=text, images=[picture], return_tensors="pt")
    # A code of 5 letters and a colon, 5 words and a question mark.
    image_id = loaded.model.config.image_token_id
    assert int((inputs["input_ids"] == image_id).sum()) == 4
    around = loaded.processor.tokenizer("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")
    assert inputs["input_ids"].shape[1] == len(around.input_ids) + 4 + 5 + 1 + 5 + 1
    out = loaded.model.generate(**inputs, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    answer = out[0, inputs["input_ids"].shape[1] :]
    tokenizer = loaded.processor.tokenizer
    assert all(tokenizer.decode([token]) for token in answer.tolist())


def test_an_answer_has_as_many_tokens_in_the_next_turn(loaded: LoadedModel) -> None:
    tokenizer = loaded.processor.tokenizer
    answer = torch.randint(100, 590, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    assert tokenizer(tokenizer.decode(answer)).input_ids == answer


def test_its_vectors_fit_it_and_the_bench_alpha_is_a_dose_of_one_per_cent(
    built: shapes.Built, loaded: LoadedModel
) -> None:
    vectors = ShiftVectors.load(built.vectors)
    vectors.check(loaded.identity)
    doses = dose(shapes.ALPHA * vectors.mean, vectors.hidden_norm)
    torch.testing.assert_close(doses, torch.full((2,), 0.01))


def test_it_is_built_once_and_anew_for_other_numbers(tmp_path: Path) -> None:
    built = shapes.build(TOY, tmp_path, "cpu")
    weights = built.model / "model.safetensors"
    before = (weights.stat().st_mtime_ns, weights.read_bytes())
    assert shapes.build(TOY, tmp_path, "cpu") == built
    assert weights.stat().st_mtime_ns == before[0]
    (tmp_path / "shapes" / "toy" / "shape.json").unlink()  # as if the build had been broken off
    shapes.build(TOY, tmp_path, "cpu")
    assert weights.stat().st_mtime_ns != before[0] and weights.read_bytes() == before[1]


@pytest.mark.parametrize(
    ("name", "low", "high"), [("llava-0.5b", 0.44e9, 0.46e9), ("llava-1.5-7b", 7.0e9, 7.1e9)]
)
def test_the_shapes_are_as_large_as_they_are_called(name: str, low: float, high: float) -> None:
    shape = shapes.SHAPES[name]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            shapes.configuration(shape, shapes.build_tokenizer(600))
        )
    assert low < sum(weight.numel() for weight in model.parameters()) < high
    assert (shape.image_size // shape.patch_size) ** 2 == 576


def test_the_memory_budget_counts_weights_rows_and_caches(
    built: shapes.Built, loaded: LoadedModel
) -> None:
    settings = Settings(
        max_rows=3, max_model_len=4096, prefix_cache_bytes=1000, vision_cache_bytes=10
    )
    found = budget(built.model, settings, "float32")
    assert found.weights_bytes == 4 * sum(weight.numel() for weight in loaded.model.parameters())
    # The model's 512 tokens bound each row: keys and values of 2 layers, 2 heads of 8.
    assert found.kv_bytes == 3 * 512 * 2 * 2 * 2 * 8 * 4
    assert found.caches_bytes == 1010
    less = budget(built.model, settings.model_copy(update={"kv_tokens": 100}), "bfloat16")
    assert less.kv_bytes == 100 * 2 * 2 * 2 * 8 * 2


def test_generate_answers_a_burst_as_one_batch(built: shapes.Built) -> None:
    prompts = Prompts(Image.new("RGB", (48, 32), "teal"))
    chats = [prompts.about_picture(number, number) for number in range(3)]
    records = asyncio.run(Generated(built.model, "float32").answer(chats, 4))
    assert [(record.tokens, len(record.gaps_s), record.error) for record in records] == [
        (4, 3, "")
    ] * 3
    assert all(0 < r.time_to_first_token_s < r.e2e_s for r in records)
    # The second question has one more word than the first; each the same words around it.
    assert records[1].prompt_tokens - records[0].prompt_tokens == len(QUESTIONS[1].split()) - len(
        QUESTIONS[0].split()
    )
    assert json.loads((built.model / "config.json").read_text())["model_type"] == "llava"
