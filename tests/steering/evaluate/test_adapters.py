"""The public formats, as tiny files of our own harmless wording."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from steering.errors import EvaluationError
from steering.evaluate.adapters import ADAPTERS
from steering.evaluate.adapters.pictured import FIGSTEP_PROMPT
from steering.evaluate.items import Item


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def items(name: str, path: Path) -> list[Item]:
    return list(ADAPTERS[name].items(name, ADAPTERS[name].rows(path)))


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def test_vlsafe(tmp_path: Path) -> None:
    row = {"id": "v-1", "image_id": "7.jpg", "caption": " A tree. ", "query": "How tall is it?"}
    unnamed = {"image_id": "8.jpg", "query": "How old is it?"}
    found = items("vlsafe", lines(tmp_path / "eval.jsonl", row, unnamed))
    assert found == [
        Item("v-1", "vlsafe", "harmful", "How tall is it?", caption="A tree.", meta=found[0].meta),
        Item("row-2", "vlsafe", "harmful", "How old is it?", meta={"image_id": "8.jpg"}),
    ]


def test_vlsafes_own_pictures_are_used_where_they_lie_beside_it(tmp_path: Path) -> None:
    path = lines(tmp_path / "eval.jsonl", {"image_id": "7.jpg", "query": "How tall is it?"})
    image = picture(tmp_path / "images" / "7.jpg")
    assert items("vlsafe", path)[0].image == image
    image.unlink()
    with pytest.raises(
        EvaluationError, match=r"eval\.jsonl, line 1: field 'image_id' names 7\.jpg"
    ):
        items("vlsafe", path)


def test_advbench(tmp_path: Path) -> None:
    path = tmp_path / "advbench.csv"
    path.write_text('goal,target\n"Bake bread, twice","Sure"\nKnit a scarf,Sure\n')
    assert items("advbench", path) == [
        Item("row-1", "advbench", "harmful", "Bake bread, twice"),
        Item("row-2", "advbench", "harmful", "Knit a scarf"),
    ]


def test_jailbreakllms(tmp_path: Path) -> None:
    path = tmp_path / "questions.csv"
    path.write_text("content_policy_id,content_policy_name,q_id,question\n0,Bread,3,How to bake?\n")
    assert items("jailbreakllms", path) == [
        Item("0-3", "jailbreakllms", "harmful", "How to bake?", meta={"topic": "Bread"})
    ]


def test_xstest_is_two_suites(tmp_path: Path) -> None:
    path = tmp_path / "xstest.csv"
    path.write_text(
        "id,prompt,type,label,focus,note\n"
        "1,How do I shoot a photo?,homonyms,safe,shoot,\n"
        "2,How do I burn a cake?,contrast_homonyms,unsafe,burn,\n"
    )
    assert [(i.id, i.kind, i.prompt) for i in items("xstest", path)] == [
        ("1", "over-refusal", "How do I shoot a photo?")
    ]
    assert [(i.id, i.kind, i.suite) for i in items("xstest-unsafe", path)] == [
        ("2", "harmful", "xstest-unsafe")
    ]
    path.write_text("id,prompt,type,label\n1,How?,homonyms,fine\n")
    with pytest.raises(EvaluationError, match="line 2: field 'label' is not 'safe' or 'unsafe'"):
        items("xstest", path)


def test_alpaca_with_and_without_input(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    rows = [{"instruction": "Add.", "input": "1 + 1"}, {"instruction": "Rhyme.", "category": None}]
    path.write_text(json.dumps(rows))
    assert [(item.kind, item.prompt) for item in items("alpaca", path)] == [
        ("harmless", "Add.\n\n1 + 1"),
        ("harmless", "Rhyme."),
    ]


def test_mm_safetybench_takes_the_plain_question_of_every_scenario(tmp_path: Path) -> None:
    row = {"Question": "How to fold a kite?", "Rephrased Question": "How to fold this?"}
    (tmp_path / "01-Kites.json").write_text(json.dumps({"0": row, "1": row}))
    (tmp_path / "02-Boats.json").write_text(json.dumps({"0": row}))
    assert [item.id for item in items("mm-safetybench", tmp_path)] == [
        "01-Kites-0",
        "01-Kites-1",
        "02-Boats-0",
    ]
    [one] = items("mm-safetybench", tmp_path / "02-Boats.json")
    assert (one.prompt, one.meta) == ("How to fold a kite?", {"topic": "02-Boats"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"no \.json file"):
        items("mm-safetybench", tmp_path / "empty")


def test_figstep_has_its_own_pictures_and_one_prompt(tmp_path: Path) -> None:
    (tmp_path / "question").mkdir()
    (tmp_path / "question" / "SafeBench-Tiny.csv").write_text(
        "dataset,category_id,category_name,task_id,question,instruction\n"
        "ForbidQI,2,Bread,5,How to bake?,Steps to bake bread.\n"
    )
    with pytest.raises(EvaluationError, match="give FigStep's folder"):
        items("figstep", tmp_path)
    image = picture(tmp_path / "images" / "SafeBench-Tiny" / "query_ForbidQI_2_5_6.png")
    [item] = items("figstep", tmp_path)
    assert (item.id, item.prompt, item.image) == ("2-5", FIGSTEP_PROMPT, image)
    assert item.meta == {"topic": "Bread", "asked": "Steps to bake bread."}
    image.unlink()
    with pytest.raises(EvaluationError, match=r"line 2: field 'task_id' names the picture query_"):
        items("figstep", tmp_path)


def test_llava_bench_joins_questions_captions_references_and_pictures(tmp_path: Path) -> None:
    question = {"question_id": 0, "image": "7.jpg", "text": "What colour?", "category": "conv"}
    lines(tmp_path / "qa90_questions.jsonl", question)
    lines(tmp_path / "qa90_gpt4_answer.jsonl", {"question_id": 0, "text": "It is red."})
    captions = {"image": "7.jpg", "captions": ["A red square.", "A square."], "instances": []}
    lines(tmp_path / "caps_boxes_coco2014_val_80.jsonl", captions)
    with pytest.raises(EvaluationError, match=r"line 1: field 'image' names the picture 7\.jpg"):
        items("llava-bench-coco", tmp_path)
    image = picture(tmp_path / "images" / "7.jpg")
    assert items("llava-bench-coco", tmp_path) == [
        Item(
            "0",
            "llava-bench-coco",
            "visual",
            "What colour?",
            image=image,
            caption="A red square. A square.",
            meta={"topic": "conv", "reference": "It is red."},
        )
    ]


def _wrong_column(path: Path) -> None:
    path.write_text("prompt\nHi\n")


def _empty_field(path: Path) -> None:
    path.write_text('goal,target\nBake,x\n"",x\n')


def _too_many_values(path: Path) -> None:
    path.write_text("goal,target\nBake,x\nBake, a cake,x\n")


def _not_utf8(path: Path) -> None:
    path.write_bytes(b"goal,target\n\xff\xfe,x\n")


def _a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (_wrong_column, "line 2: no field 'goal'; there are: prompt"),
        (_empty_field, "line 3: field 'goal' is missing or empty"),
        (_too_many_values, "line 3: more values than the header has names"),
        (_not_utf8, "not UTF-8 text (byte 12)"),
        (_a_folder, "Is a directory"),
        (lambda _: None, "No such file"),
    ],
)
def test_a_broken_csv_is_an_error_with_its_place(
    write: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    write(path)
    with pytest.raises(EvaluationError) as error:
        items("advbench", path)
    assert str(error.value).startswith(str(path)) and words in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"image_id": "1.jpg"}', "line 2: field 'query' is missing or empty"),
        ('{"image_id": "1.jpg", "query": ["secret"]}', "line 2: field 'query' is not text"),
        ('{"image_id": true, "query": "x"}', "line 2: field 'image_id' is not text"),
    ],
)
def test_a_broken_json_line_is_an_error_with_its_place_and_not_its_content(
    line: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text('{"image_id": "1.jpg", "query": "Fine?"}\n' + line + "\n")
    with pytest.raises(EvaluationError) as error:
        items("vlsafe", path)
    assert f"{path}, {words}" in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("text", ["{}", "not JSON", "[1]", "[" * 100_000])
def test_a_broken_json_file_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=r"alpaca\.json"):
        items("alpaca", path)
