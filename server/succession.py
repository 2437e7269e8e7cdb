"""Whether a store still holds the data that are in force here, and who may put others in force.

Pure. The rule, which fails closed:

A store *continues* what is in force when its epoch is the same, its revision is not behind, and
each document in force stands there as it is here or in a later version. Then what is new in it is
put in force. Any other store (emptied, replaced, gone back to an older state) is *foreign*:
nothing of it is put in force, however much is written into it, and the last good documents stay.
That ends when the store continues them again, or when an operator says so: by a commit that writes
`succeeds/<epoch in force>`, naming the revision in force. One such commit is for the whole fleet,
and it is counted once: if the store goes back again, it takes another one. With it an operator
either adopts what the store says now, or restores what a replica has in force, in the same commit.

A replica that has nothing in force yet takes any store: what nobody may use it has no key for, and
who needs none is under the policy of the settings.
"""

import json
from dataclasses import dataclass, field

from steering.stores.base import Changes, Document

SUCCESSION_PREFIX = "succeeds/"  # documents {"revision": the newest that may be given up}


@dataclass(frozen=True)
class Restoration:
    """What makes a store say again what is in force here: writes, and the store's revisions of the
    same documents, for `Store.commit`; vector sets to put into it first, by id."""

    writes: dict[str, str | None]
    expected: dict[str, int]
    vectors: tuple[bytes, ...] = ()


@dataclass
class InForce:
    """The documents in force on this replica, deleted ones included, by key."""

    epoch: str = ""
    revision: int = 0
    documents: dict[str, Document] = field(default_factory=dict)

    def contradiction(self, changes: Changes, is_whole: bool) -> str | None:
        """Why the store does not continue what is in force; None if it does.

        is_whole: the changes are all of the store's documents, so that each can be compared.
        """
        if not self.revision:
            return None
        if not changes.epoch:
            return f"the store is empty; revision {self.revision} is in force here"
        if changes.epoch != self.epoch:
            return (
                "the store holds other data than was in force (emptied?): "
                f"epoch {changes.epoch[:8]}, and {self.epoch[:8]} is in force here"
            )
        if changes.revision < self.revision:
            return (
                f"the store went back to revision {changes.revision}; "
                f"{self.revision} is in force here"
            )
        if is_whole and not self._is_part_of(changes):
            return (
                f"the store lost changes up to revision {self.revision}, which are in force here, "
                "and others took their revisions"
            )
        return None

    def is_succeeded_by(self, changes: Changes) -> bool:
        """Whether an operator let all of the store's documents, `changes`, succeed these."""
        for document in changes.documents:
            if document.key == SUCCESSION_PREFIX + self.epoch:
                is_new = self.documents.get(document.key) != document
                return is_new and _given_up(document) >= self.revision
        return False

    def take(self, changes: Changes, is_whole: bool) -> Changes:
        """Put changes in force; returns what of them is new, all of them where is_whole."""
        if is_whole:
            self.documents = {}
        new = tuple(each for each in changes.documents if is_whole or each.revision > self.revision)
        self.documents.update({each.key: each for each in new})
        self.epoch, self.revision = changes.epoch, changes.revision
        return Changes(changes.epoch, changes.revision, new)

    def adoption(self) -> dict[str, str | None]:
        """The writes by which the store's documents succeed these."""
        return {SUCCESSION_PREFIX + self.epoch: json.dumps({"revision": self.revision})}

    def restoration(self, held: Changes) -> Restoration:
        """What makes a store with the documents `held` say what is in force here."""
        there = {each.key: each for each in held.documents if each.value is not None}
        here = {key: each.value for key, each in self.documents.items() if each.value is not None}
        writes: dict[str, str | None] = {
            key: value
            for key, value in here.items()
            if key not in there or there[key].value != value
        }
        writes |= dict.fromkeys(there.keys() - here.keys())
        writes |= self.adoption()
        expected = {key: there[key].revision if key in there else 0 for key in writes}
        return Restoration(writes, expected)

    def _is_part_of(self, whole: Changes) -> bool:
        known = {each.key: each for each in whole.documents if each.revision <= self.revision}
        newer = {each.key for each in whole.documents if each.revision > self.revision}
        return {k: each for k, each in self.documents.items() if k not in newer} == known


def _given_up(document: Document) -> int:
    """The revision that a document of succession names; -1 where it cannot be read."""
    try:
        return int(json.loads(document.value or "")["revision"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return -1
