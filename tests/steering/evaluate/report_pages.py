"""A report's page, read back: tables cell by cell, tags, ids and text."""

from html.parser import HTMLParser

Table = list[list[str]]
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Tables by id or caption, every tag with its attributes, and text outside style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, Table] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.text, self.style = "", ""
        self._open: list[str] = []
        self._table: Table = []
        self._id = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"] or "")
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table, self._id = [], found.get("id") or ""
        if tag == "tr":
            self._table.append([])
        if tag in ("td", "th"):
            self._table[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another"
        if tag == "caption":
            self._id = self._id or self.text.rpartition("\0")[2].strip()
        if tag == "table":
            self.tables[self._id] = self._table

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.style += data
            return
        if "caption" in self._open and not self.text.endswith("\0") and self._open[-1] == "caption":
            self.text += "\0"
        self.text += data
        if self._table and self._table[-1] and self._open[-1:] and "table" in self._open:
            self._table[-1][-1] += data + " "


def words(text: str) -> str:
    return " ".join(text.split())
