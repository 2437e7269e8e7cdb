"""One suite for every store."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from steering.errors import NotFoundError, StoreError, VectorError
from steering.stores import MemoryStore, SqliteStore, Store, open_store
from steering.stores.base import resolve
from tests.steering.samples import shift_vectors

ONE, TWO = shift_vectors(1), shift_vectors(2)


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/a/b/store.db"
    store = open_store(url)
    yield store
    store.close()


def test_a_stored_set_comes_back_byte_for_byte_under_its_own_id(store: Store) -> None:
    assert store.put_vectors(ONE.to_bytes()) == ONE.id
    assert store.get_vectors(ONE.id).to_bytes() == ONE.to_bytes()


def test_storing_a_set_again_changes_nothing(store: Store) -> None:
    assert store.put_vectors(ONE.to_bytes()) == store.put_vectors(ONE.to_bytes())
    assert len(store.list_vectors()) == 1


def test_the_list_is_oldest_first_with_provenance_and_size(store: Store) -> None:
    assert store.list_vectors() == []
    for vectors in (TWO, ONE):
        store.put_vectors(vectors.to_bytes())
    records = store.list_vectors()
    assert [record.id for record in records] == [TWO.id, ONE.id]
    assert records[0].manifest == TWO.manifest
    assert records[0].size_bytes == len(TWO.to_bytes())
    assert records[0].created_at == TWO.manifest.created_at


def test_damaged_bytes_are_refused_and_not_kept(store: Store) -> None:
    data = bytearray(ONE.to_bytes())
    data[-1] ^= 1
    with pytest.raises(VectorError):
        store.put_vectors(bytes(data))
    assert store.list_vectors() == []


def test_an_unknown_id_is_not_found(store: Store) -> None:
    with pytest.raises(NotFoundError, match=ONE.id):
        store.get_vectors(ONE.id)


def test_an_alias_moves_from_set_to_set(store: Store) -> None:
    assert store.aliases() == {}
    for vectors in (ONE, TWO):
        store.put_vectors(vectors.to_bytes())
        store.set_alias("default", vectors.id)
        assert store.aliases() == {"default": vectors.id}
    store.set_alias("old", ONE.id)
    assert store.aliases() == {"default": TWO.id, "old": ONE.id}


def test_an_alias_to_an_unknown_set_is_refused_and_the_last_good_one_stays(store: Store) -> None:
    store.put_vectors(ONE.to_bytes())
    store.set_alias("default", ONE.id)
    with pytest.raises(NotFoundError, match=TWO.id):
        store.set_alias("default", TWO.id)
    assert store.aliases() == {"default": ONE.id}


def test_what_a_caller_does_to_the_answers_does_not_reach_the_store(store: Store) -> None:
    store.aliases()["default"] = "x"
    store.list_vectors().append(None)  # type: ignore[arg-type]
    assert (store.aliases(), store.list_vectors()) == ({}, [])


def test_threads_may_read_and_write_at_once(store: Store) -> None:
    many = [shift_vectors(seed).to_bytes() for seed in range(8)]
    failures: list[BaseException] = []

    def work(data: bytes) -> None:
        try:
            for _ in range(5):
                vector_id = store.put_vectors(data)
                store.set_alias("default", vector_id)
                assert store.get_vectors(vector_id).to_bytes() == data
                assert store.aliases()["default"]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(data,)) for data in many]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (failures, len(store.list_vectors())) == ([], 8)


def test_names_resolve_by_alias_id_and_start_of_id(store: Store) -> None:
    store.put_vectors(ONE.to_bytes())
    store.set_alias("default", ONE.id)
    for name in ("default", ONE.id, ONE.id[:8]):
        assert resolve(store, name) == ONE.id
    for name in (ONE.id[:7], TWO.id, "other", ""):
        with pytest.raises(NotFoundError, match="aliases: default; vector sets: 1"):
            resolve(store, name)


def test_an_alias_wins_over_the_start_of_an_id(store: Store) -> None:
    for vectors in (ONE, TWO):
        store.put_vectors(vectors.to_bytes())
    store.set_alias(ONE.id[:8], TWO.id)
    assert resolve(store, ONE.id[:8]) == TWO.id


def test_urls_choose_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_store("memory://"), MemoryStore)
    monkeypatch.chdir(tmp_path)
    for url, path in (("sqlite:///here.db", "here.db"), (f"sqlite:///{tmp_path}/abs.db", "abs.db")):
        store = open_store(url)
        assert isinstance(store, SqliteStore)
        store.close()
        assert (tmp_path / path).is_file()


@pytest.mark.parametrize("url", ["redis://localhost", "sqlite://", "sqlite:///", "file.db", ""])
def test_other_urls_are_refused_with_the_ones_there_are(url: str) -> None:
    with pytest.raises(StoreError, match=r"sqlite:///path.*memory://"):
        open_store(url)
