"""What only a file can suffer: other processes, kill -9, damage."""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from steering.errors import StoreError, VectorError
from steering.stores import SqliteStore
from tests.steering.samples import shift_vectors

WRITER = """
import sys
from pathlib import Path
from steering.stores import SqliteStore
from tests.steering.samples import shift_vectors

path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
store = SqliteStore(Path(path))
for seed in range(first, last):
    vector_id = store.put_vectors(shift_vectors(seed).to_bytes())
    store.set_alias("latest", vector_id)
    print(vector_id, flush=True)
"""


def writer(path: Path, first: int, last: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(first), str(last)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )


def start(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def filled(path: Path) -> Iterator[Path]:
    store = SqliteStore(path)
    store.put_vectors(shift_vectors().to_bytes())
    store.set_alias("default", shift_vectors().id)
    store.close()
    yield path


def test_a_reopened_store_has_what_was_written(filled: Path) -> None:
    store = SqliteStore(filled)
    assert store.aliases() == {"default": shift_vectors().id}
    assert store.get_vectors(shift_vectors().id).to_bytes() == shift_vectors().to_bytes()
    store.close()


def test_processes_that_create_and_write_at_once_lose_nothing(path: Path) -> None:
    """Each starts at the same line, so they also race for the file's creation."""
    processes = [writer(path, 100 * i, 100 * i + 10) for i in range(3)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        start(process)
    store = SqliteStore(path)  # a fourth, while they write
    written = []
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        written += output.split()
    assert len(written) == 30
    assert {record.id for record in store.list_vectors()} == set(written)
    assert store.aliases()["latest"] in written
    for vector_id in written:
        store.get_vectors(vector_id)
    store.close()


def test_kill_9_while_writing_loses_no_set_that_was_reported(path: Path) -> None:
    process = writer(path, 0, 10**6)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    start(process)
    reported = [process.stdout.readline().strip() for _ in range(8)]
    process.send_signal(signal.SIGKILL)
    reported += process.communicate(timeout=60)[0].split("\n")
    reported = [line for line in reported if len(line) == 64]
    store = SqliteStore(path)
    stored = [record.id for record in store.list_vectors()]
    assert stored[: len(reported)] == reported
    assert len(stored) - len(reported) <= 1
    for vector_id in stored:
        store.get_vectors(vector_id)
    assert store.aliases()["latest"] in stored[len(reported) - 1 :]
    store.put_vectors(shift_vectors(-1).to_bytes())
    store.close()


def test_a_write_that_fails_half_way_leaves_the_alias_as_it_was(filled: Path) -> None:
    store = SqliteStore(filled)
    with pytest.raises(RuntimeError), store._transaction() as connection:
        connection.execute("delete from aliases")
        raise RuntimeError
    assert store.aliases() == {"default": shift_vectors().id}
    store.close()


def test_a_flipped_byte_in_a_stored_set_is_refused_with_file_and_id(filled: Path) -> None:
    data = bytearray(shift_vectors().to_bytes())
    data[-5] ^= 1
    connection = sqlite3.connect(filled)
    connection.execute("update vectors set data = ?", (bytes(data),))
    connection.commit()
    connection.close()
    store = SqliteStore(filled)
    with pytest.raises(VectorError, match=rf"{filled}: vector set {shift_vectors().id[:12]}"):
        store.get_vectors(shift_vectors().id)
    assert store.aliases() == {"default": shift_vectors().id}
    store.close()


def test_a_damaged_manifest_column_is_refused_with_file_and_id(filled: Path) -> None:
    connection = sqlite3.connect(filled)
    connection.execute("update vectors set manifest = '{'")
    connection.commit()
    connection.close()
    store = SqliteStore(filled)
    with pytest.raises(StoreError, match=f"{filled}: the manifest of {shift_vectors().id[:12]}"):
        store.list_vectors()
    store.close()


def test_a_file_that_is_no_database_is_refused_by_name(path: Path) -> None:
    path.write_bytes(b"not a database, " * 100)
    with pytest.raises(StoreError, match=f"{path}: file is not a database"):
        SqliteStore(path)


def test_overwritten_pages_give_an_error_that_names_the_file(filled: Path) -> None:
    content = bytearray(filled.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    filled.write_bytes(content)
    store = SqliteStore(filled)
    for read in (store.aliases, store.list_vectors, lambda: store.get_vectors("x" * 64)):
        with pytest.raises(StoreError, match=str(filled)):
            read()
    store.close()


def test_a_schema_of_another_version_is_refused(filled: Path) -> None:
    connection = sqlite3.connect(filled)
    connection.execute("pragma user_version = 7")
    connection.close()
    with pytest.raises(StoreError, match="schema version 7"):
        SqliteStore(filled)


def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="store.db"):
        SqliteStore(tmp_path / "file" / "store.db")
    with pytest.raises(StoreError, match=str(tmp_path)):
        SqliteStore(tmp_path)


def test_a_closed_store_gives_a_store_error(path: Path) -> None:
    store = SqliteStore(path)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.aliases()
