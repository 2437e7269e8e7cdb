"""What only a file can suffer: other processes, kill -9, damage."""

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steering.errors import ReadOnlyError, StoreError, VectorError
from steering.stores import SqliteStore
from steering.stores.base import aliases
from tests.steering.samples import shift_vectors

pytestmark = pytest.mark.anyio

ONE = shift_vectors()
WRITER = """
import asyncio
import json
import sys
from pathlib import Path
from steering.stores import SqliteStore
from tests.steering.samples import shift_vectors

async def write(path, first, last):
    store = SqliteStore(Path(path))
    for seed in range(int(first), int(last)):
        vector_id = await store.put_vectors(shift_vectors(seed).to_bytes())
        await store.commit({"alias/latest": json.dumps({"vector": vector_id})}, {}, str(seed))
        print(vector_id, flush=True)

print("ready", flush=True)
sys.stdin.readline()
asyncio.run(write(*sys.argv[1:]))
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


def alter(path: Path, *statements: str, values: tuple[object, ...] = ()) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement, values)
    connection.commit()
    connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
async def filled(path: Path) -> Path:
    store = SqliteStore(path)
    await store.put_vectors(ONE.to_bytes())
    await store.commit({"alias/default": json.dumps({"vector": ONE.id})}, {}, "filled")
    await store.heartbeat("replica", "ok", 60)
    await store.close()
    return path


async def test_a_reopened_store_has_what_was_written(filled: Path) -> None:
    store = SqliteStore(filled)
    changes = await store.changes()
    assert (len(changes.epoch), changes.revision) == (32, 1)
    assert await aliases(store) == {"default": ONE.id}
    assert [record.entry for record in await store.audit(9)] == ["filled"]
    assert await store.replicas() == {"replica": "ok"}
    assert (await store.get_vectors(ONE.id)).to_bytes() == ONE.to_bytes()
    assert await store.commit({"a": "1"}, {}, "") == 2
    assert (await store.changes()).epoch == changes.epoch
    await store.close()


@pytest.mark.slow
async def test_processes_that_create_and_write_at_once_lose_nothing(path: Path) -> None:
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
    assert {record.id for record in await store.list_vectors()} == set(written)
    assert (await aliases(store))["latest"] in written
    assert [record.revision for record in await store.audit(99)] == list(range(30, 0, -1))
    for vector_id in written:
        await store.get_vectors(vector_id)
    await store.close()


async def test_kill_9_while_writing_loses_nothing_that_was_reported(path: Path) -> None:
    process = writer(path, 0, 10**6)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    start(process)
    reported = [process.stdout.readline().strip() for _ in range(8)]
    process.send_signal(signal.SIGKILL)
    reported += process.communicate(timeout=60)[0].split("\n")
    reported = [line for line in reported if len(line) == 64]
    store = SqliteStore(path)
    stored = [record.id for record in await store.list_vectors()]
    assert stored[: len(reported)] == reported
    assert len(stored) - len(reported) <= 1
    for vector_id in stored:
        await store.get_vectors(vector_id)
    assert (await aliases(store))["latest"] in stored[len(reported) - 1 :]
    assert (await store.changes()).revision >= len(reported)
    await store.put_vectors(shift_vectors(-1).to_bytes())
    await store.close()


async def test_another_process_s_commit_wakes_this_one_within_a_second(path: Path) -> None:
    store = SqliteStore(path)
    wakeups = store.wakeups()
    await anext(wakeups)
    process = writer(path, 0, 1)
    start(process)
    await asyncio.wait_for(anext(wakeups), 30)
    seen = time.monotonic()
    while (await store.changes()).revision == 0:  # the first wake-up is for the vector set
        await asyncio.wait_for(anext(wakeups), 10)
    assert time.monotonic() - seen < 5
    process.communicate(timeout=30)
    await store.close()


async def test_a_write_that_fails_half_way_leaves_the_documents_as_they_were(filled: Path) -> None:
    store = SqliteStore(filled)
    before = await store.changes()
    with pytest.raises(RuntimeError), store._transaction() as connection:
        connection.execute("delete from documents")
        raise RuntimeError
    assert await store.changes() == before
    await store.close()


async def test_a_flipped_byte_is_refused_with_file_and_id_and_mended_by_the_same_set(
    filled: Path,
) -> None:
    data = bytearray(ONE.to_bytes())
    data[-5] ^= 1
    alter(filled, "update vectors set data = ?", values=(bytes(data),))
    store = SqliteStore(filled)
    with pytest.raises(VectorError, match=rf"{filled}: vector set {ONE.id[:12]}"):
        await store.get_vectors(ONE.id)
    assert await aliases(store) == {"default": ONE.id}
    await store.put_vectors(ONE.to_bytes())
    assert (await store.get_vectors(ONE.id)).to_bytes() == ONE.to_bytes()
    await store.close()


async def test_a_damaged_manifest_column_is_refused_with_file_and_id(filled: Path) -> None:
    alter(filled, "update vectors set manifest = '{'")
    store = SqliteStore(filled)
    with pytest.raises(StoreError, match=f"{filled}: the manifest of {ONE.id[:12]}"):
        await store.list_vectors()
    await store.close()


def test_a_file_that_is_no_database_is_refused_by_name(path: Path) -> None:
    path.write_bytes(b"not a database, " * 100)
    with pytest.raises(StoreError, match=f"{path}: file is not a database"):
        SqliteStore(path)


async def test_overwritten_pages_give_an_error_that_names_the_file(filled: Path) -> None:
    content = bytearray(filled.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    filled.write_bytes(content)
    store = SqliteStore(filled)
    for read in (
        *(store.changes, store.list_vectors, lambda: store.get_vectors("x" * 64)),
        *(lambda: store.audit(1), store.replicas, lambda: store.commit({"a": "1"}, {}, "")),
    ):
        with pytest.raises(StoreError, match=str(filled)):
            await read()
    await store.close()


def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="store.db"):
        SqliteStore(tmp_path / "file" / "store.db")
    with pytest.raises(StoreError, match=str(tmp_path)):
        SqliteStore(tmp_path)


async def test_a_connection_that_may_only_read_says_that_it_cannot_write(filled: Path) -> None:
    store = SqliteStore(filled)
    store._connection.execute("pragma query_only = on")
    with pytest.raises(ReadOnlyError, match=str(filled)):
        await store.commit({"a": "1"}, {}, "")
    assert (await store.changes()).revision == 1
    await store.close()


async def test_a_closed_store_gives_a_store_error(path: Path) -> None:
    store = SqliteStore(path)
    wakeups = store.wakeups()
    await anext(wakeups)
    await store.close()
    for use in (store.changes, lambda: store.commit({}, {}, ""), lambda: anext(wakeups)):
        with pytest.raises(StoreError, match="closed"):
            await use()


async def test_a_writer_that_waits_for_another_process_does_not_stop_the_loop(path: Path) -> None:
    store = SqliteStore(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")
    waiting = asyncio.create_task(store.commit({"a": "1"}, {}, ""))
    started = time.monotonic()
    await asyncio.sleep(0.1)
    assert time.monotonic() - started < 2 and not waiting.done()
    other.execute("rollback")
    other.close()
    assert await asyncio.wait_for(waiting, 10) == 1
    await store.close()
