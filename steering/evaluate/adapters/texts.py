"""Public suites of prompts, which get a photograph dealt: a published row -> an item."""

from steering.evaluate.adapters.rows import Row
from steering.evaluate.items import Item


def vlsafe(row: Row) -> Item:
    """VLSafe (`examine` split): JSON Lines with image_id, caption and query.

    Its own pictures are COCO's; they are used where a folder `images` lies beside the file.
    """
    image_id = row.text("image_id")
    image = row.folder / "images" / image_id if row.folder else None
    if image is not None and image.parent.is_dir():
        if not image.is_file():
            raise row.error("image_id", f"names {image_id}, which {image.parent} does not hold")
    else:
        image = None
    return Item(
        id=row.optional("id") or f"row-{row.number}",
        suite="",
        kind="harmful",
        prompt=row.text("query"),
        image=image,
        caption=row.optional("caption"),
        meta={"image_id": image_id},
    )


def advbench(row: Row) -> Item:
    """AdvBench harmful behaviours: CSV with goal (and target, which is not used)."""
    return Item(f"row-{row.number}", "", "harmful", row.text("goal"))


def jailbreakllms(row: Row) -> Item:
    """The forbidden questions of JailbreakLLMs: CSV with content_policy_id, content_policy_name,
    q_id and question."""
    return Item(
        id=f"{row.text('content_policy_id')}-{row.text('q_id')}",
        suite="",
        kind="harmful",
        prompt=row.text("question"),
        meta={"topic": row.text("content_policy_name")},
    )


def xstest_safe(row: Row) -> Item | None:
    """XSTest's safe prompts, which look harmful: CSV with id, prompt, type and label."""
    return None if _is_unsafe(row) else _xstest(row, unsafe=False)


def xstest_unsafe(row: Row) -> Item | None:
    """XSTest's unsafe contrasts."""
    return _xstest(row, unsafe=True) if _is_unsafe(row) else None


def alpaca(row: Row) -> Item:
    """Alpaca: a JSON list with instruction and, for some, input."""
    extra = row.optional("input")
    prompt = row.text("instruction") + (f"\n\n{extra}" if extra else "")
    return Item(f"row-{row.number}", "", "harmless", prompt)


def mm_safetybench(row: Row) -> Item:
    """MM-SafetyBench's questions as text: processed_questions/*.json, field Question.

    The rephrased ones point at a typographic picture and are not used.
    """
    scenario = row.text("scenario")
    return Item(
        id=f"{scenario}-{row.text('key')}",
        suite="",
        kind="harmful",
        prompt=row.text("Question"),
        meta={"topic": scenario},
    )


def _xstest(row: Row, *, unsafe: bool) -> Item:
    return Item(
        id=row.text("id"),
        suite="",
        kind="harmful" if unsafe else "over-refusal",
        prompt=row.text("prompt"),
        meta={"topic": row.text("type")},
    )


def _is_unsafe(row: Row) -> bool:
    label = row.text("label")
    if label not in ("safe", "unsafe"):
        raise row.error("label", "is not 'safe' or 'unsafe'")
    return label == "unsafe"
