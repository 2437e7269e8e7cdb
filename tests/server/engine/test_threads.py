"""How many cores a thread's operations use."""

import threading
from collections.abc import Iterator

import pytest
import torch

from server.app import create_app
from server.engine import threads
from tests.server.conftest import make_settings
from tests.server.fakes import FakeEngine


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "NUM_CORES", 2)
    yield
    torch.set_num_threads(before)


def test_the_engines_thread_keeps_all_cores_and_no_other_takes_more_than_one() -> None:
    seen: dict[str, int] = {}
    taken, limited = threading.Event(), threading.Event()

    def engine() -> None:
        threads.take_all_cores()
        taken.set()
        assert limited.wait(10)
        seen["engine"] = torch.get_num_threads()

    def other() -> None:
        seen["later"] = torch.get_num_threads()

    first = threading.Thread(target=engine)
    first.start()
    assert taken.wait(10)
    threads.take_one_core()  # as the server does when its engine has started
    limited.set()
    later = threading.Thread(target=other)
    later.start()
    first.join(10)
    later.join(10)
    assert seen == {"engine": 2, "later": 1}
    assert torch.get_num_threads() == 1


@pytest.mark.anyio
async def test_a_server_leaves_the_cores_to_its_engine() -> None:
    torch.set_num_threads(2)
    app = create_app(make_settings(), engine=FakeEngine())
    async with app.router.lifespan_context(app):
        assert torch.get_num_threads() == 1
