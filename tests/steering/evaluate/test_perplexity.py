"""Likelihoods of a run's answers, against one full pass of transformers for each."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from steering.corruption import corrupt
from steering.errors import EvaluationError
from steering.evaluate.conditions import parse
from steering.evaluate.items import Item
from steering.evaluate.perplexity import FILE, current, load, save
from steering.evaluate.perplexity_passes import measure_perplexity
from steering.evaluate.pictures import asked_image
from steering.evaluate.record import RunDir
from steering.models import LoadedModel, identity_of
from steering.processors import writes_its_own_bos
from tests.steering.evaluate.judged_runs import add, answer
from tests.tiny_models import TinyModel

CONDITIONS = ("base", "text-only", "caption", "blank", "noise", "dataset:alpha=0.5")
ANSWERS = ("Fine.", "No", "A cat, <image>", "I", "It is \u00e9!", "A long answer, of many bytes.")
TARGETS = dict(zip(CONDITIONS, ANSWERS, strict=True))


def loaded(tiny: TinyModel) -> LoadedModel:
    return LoadedModel(
        tiny.model, tiny.processor, identity_of(tiny.model, tiny.processor, model_id="tiny")
    )


def items(folder: Path) -> list[Item]:
    found = []
    for number, (colour, size) in enumerate((("red", (30, 30)), ("blue", (32, 20)))):
        picture = folder / f"{colour}.png"
        Image.new("RGB", size, colour).save(picture)
        found.append(
            Item(str(number), "own", "harmless", f"Say {number}", picture, caption="a colour")
        )
    return found


def make_run(
    folder: Path, asked: Sequence[Item], texts: dict[str, str], **settings: object
) -> Path:
    """Each condition's answer is the same to every item."""
    run = RunDir(folder / "run")
    conditions = [parse(name) for name in texts]
    written = [
        {"name": each.name, "picture": each.picture, "steering": each.steering}
        for each in conditions
    ]
    run.begin({"conditions": written, **settings}, {}, asked, resume=False)
    add(run.path, [answer(item, name, text) for item in asked for name, text in texts.items()])
    return run.path


def plain(tiny: TinyModel, text: str, image: Image.Image | None, target: str) -> float:
    """One sequence, one full pass, no cache."""
    parts: list[dict[str, str]] = [] if image is None else [{"type": "image"}]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    prompt = tiny.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    inputs: dict[str, Any] = dict(
        tiny.processor(
            text=[prompt],
            images=None if image is None else [[image]],
            add_special_tokens=not writes_its_own_bos(tiny.processor, prompt),
            return_tensors="pt",
        )
    )
    alphabet = tiny.processor.tokenizer.get_vocab()
    letters = tiny.processor.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(target)
    ids = [alphabet[letter] for part, _ in letters for letter in part]  # a token is a byte
    assert len(ids) == len(target.encode())
    start = inputs["input_ids"].shape[1]
    tokens = torch.tensor([ids])
    for name in inputs.keys() & {"attention_mask", "token_type_ids", "mm_token_type_ids"}:
        fill = torch.ones_like if name == "attention_mask" else torch.zeros_like
        inputs[name] = torch.cat([inputs[name], fill(tokens)], dim=1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    with torch.inference_mode():
        logits = tiny.model(**inputs, use_cache=False).logits[0, start - 1 : -1]
    chosen = logits.log_softmax(dim=-1)[torch.arange(len(ids)), torch.tensor(ids)]
    return -float(chosen.mean())


def test_scores_are_those_of_one_full_pass_for_each_answer(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    asked = items(tmp_path)
    run = make_run(tmp_path, asked, TARGETS)
    found = {each.key: each for each in measure_perplexity(run, loaded(tiny_model))}
    assert len(found) == len(asked) * len(CONDITIONS)
    for item in asked:
        own = Image.open(item.image).convert("RGB")  # type: ignore[arg-type]
        shown = {
            "text-only": None,
            "caption": None,
            "blank": corrupt(own, "blank"),
            "noise": corrupt(own, "noise"),
        }
        for name, target in TARGETS.items():
            text = item.prompt
            alone = plain(tiny_model, text, None, target)
            if name == "caption":
                text = f"The picture shows: a colour\n\n{text}"
            asked_nll = plain(tiny_model, text, shown.get(name, own), target)
            score = found[name, "own", item.id]
            assert score.num_tokens == len(target.encode())
            assert score.nll_asked == pytest.approx(asked_nll, abs=1e-4)
            assert score.nll_text == pytest.approx(alone, abs=1e-4)
            assert score.nll == min(score.nll_asked, score.nll_text)


def test_equal_answers_and_many_of_them_are_scored_alike(
    tmp_path: Path, tiny_llava: TinyModel
) -> None:
    """More answers to a prompt than one pass takes, of many lengths."""
    names = [f"dataset:alpha={number}" for number in range(40)]
    texts = {name: "ab " * (number % 20 + 1) for number, name in enumerate(names)}
    run = make_run(tmp_path, items(tmp_path)[:1], texts)
    found = measure_perplexity(run, loaded(tiny_llava))
    own = Image.new("RGB", (30, 30), "red")
    for number, score in enumerate(found):
        assert score.condition == names[number]
        expected = plain(tiny_llava, "Say 0", own, texts[names[number]])
        assert score.nll_asked == pytest.approx(expected, abs=1e-4)


def test_babble_is_less_likely_than_the_models_own_answer(
    tmp_path: Path, tiny_llava: TinyModel
) -> None:
    tokenizer, [item, _] = tiny_llava.processor.tokenizer, items(tmp_path)
    words = tiny_llava.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": item.prompt}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz ", add_special_tokens=False)["input_ids"]
    others = [token for token in range(len(tokenizer)) if token not in letters]
    inputs = tokenizer(words, return_tensors="pt")
    made = tiny_llava.model.generate(
        **inputs, max_new_tokens=24, do_sample=False, suppress_tokens=others
    )
    own = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :])
    babble = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=24))
    run = make_run(tmp_path, [item], {"base": own, "dataset:alpha=3": babble})
    first, second = measure_perplexity(run, loaded(tiny_llava))
    assert first.num_tokens == second.num_tokens == 24
    assert second.nll > first.nll + 1


def test_answers_that_are_empty_or_never_came_are_left_out(
    tmp_path: Path, tiny_llava: TinyModel
) -> None:
    [item, other] = items(tmp_path)
    run = make_run(tmp_path, [item, other], {"base": "Fine.", "text-only": " \n"})
    add(run, [answer(other, "base", "", error="gone")])
    seen: list[tuple[int, int]] = []
    found = measure_perplexity(
        run, loaded(tiny_llava), progress=lambda done, all_: seen.append((done, all_))
    )
    assert [each.key for each in found] == [("base", "own", "0")]
    assert seen == [(1, 1)]


def test_a_later_answer_has_no_score_of_an_older_one(tmp_path: Path, tiny_llava: TinyModel) -> None:
    [item, other] = items(tmp_path)
    run = make_run(tmp_path, [item, other], {"base": "Fine.", "text-only": "Fine."})
    save(run, measure_perplexity(run, loaded(tiny_llava)))
    add(run, [answer(item, "base", "Well."), answer(other, "base", "", error="gone")])
    scored = load(run)
    assert scored is not None and len(scored) == 4
    found = current(scored, RunDir(run).answers())
    assert found.keys() == {("text-only", "own", "0"), ("text-only", "own", "1")}


def test_a_file_that_holds_something_else_is_named(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    (tmp_path / FILE).write_text('{"condition": "base"}\n')
    with pytest.raises(EvaluationError, match=rf"{FILE}, line 1: not a perplexity"):
        load(tmp_path)


def test_a_condition_that_the_run_does_not_tell_is_refused(
    tmp_path: Path, tiny_llava: TinyModel
) -> None:
    [item, _] = items(tmp_path)
    run = make_run(tmp_path, [item], {"base": "Fine."})
    add(run, [answer(item, "blank", "Fine.")])
    with pytest.raises(EvaluationError, match="how own/0 was asked as 'blank'"):
        measure_perplexity(run, loaded(tiny_llava))


def test_likelihoods_that_are_no_numbers_are_refused(tmp_path: Path, tiny_llava: TinyModel) -> None:
    [item, _] = items(tmp_path)
    run = make_run(tmp_path, [item], {"base": "Fine."})
    broken = TinyModel("broken", _Broken(tiny_llava.model), tiny_llava.processor)
    identity = loaded(tiny_llava).identity
    with pytest.raises(EvaluationError, match="try --dtype float32"):
        measure_perplexity(run, LoadedModel(broken.model, broken.processor, identity))


class _Broken:
    """A model whose logits overflow."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        output = self._model(**inputs)
        output.logits = output.logits * float("inf")
        return output


def test_a_picture_is_upright_and_on_white_as_a_server_has_it(tmp_path: Path) -> None:
    sideways = Image.new("RGB", (4, 2), "red")
    sideways.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    sideways.save(tmp_path / "turned.png", exif=exif)
    item = Item("0", "own", "harmless", "Say", tmp_path / "turned.png")
    shown = asked_image(item, "own")
    assert shown is not None and shown.size == (2, 4)
    assert shown.getpixel((1, 0)) == (0, 0, 255)
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    clear = asked_image(replace(item, image=tmp_path / "clear.png"), "own")
    assert clear is not None and clear.getpixel((0, 0)) == (255, 255, 255)
    assert asked_image(item, "none") is None and asked_image(item, "caption") is None
    (tmp_path / "torn.png").write_bytes((tmp_path / "turned.png").read_bytes()[:60])
    with pytest.raises(EvaluationError, match="suite own, 0: not a picture"):
        asked_image(replace(item, image=tmp_path / "torn.png"), "own")


def test_the_file_is_one_json_object_an_answer(tmp_path: Path, tiny_llava: TinyModel) -> None:
    [item, _] = items(tmp_path)
    run = make_run(tmp_path, [item], {"base": "Fine."})
    [score] = measure_perplexity(run, loaded(tiny_llava))
    save(run, [score])
    [line] = (run / FILE).read_text().splitlines()
    values = json.loads(line)
    assert values["nll_asked"] == score.nll_asked and values["num_tokens"] == 5
    assert values["dtype"] == "float32" and load(run) == [score]
