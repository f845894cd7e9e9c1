import re
import signal
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.pool import RankPool
from tests.training.runs import make_data, pretrain, succeeded

# Files whose tests share a costly fixture run on few workers of pytest-xdist: otherwise each worker makes its own.
# Two groups of the one that most files want, so that two workers share the load.  (`--dist loadgroup` of xdist 3.8
# groups nothing in pytest 9.2.)
GROUPS = {"finished_run": 1, "ranks": 2}


class ByFixture(LoadScopeScheduling):
    """Sends all files of a group to the same worker, and any other test to any worker."""

    def _split_scope(self, nodeid: str) -> str:
        return _group_of(nodeid.partition("::")[0]) or nodeid


def pytest_configure() -> None:
    """What a shell starts in the background ignores these signals, and so would all that the tests start."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@cache
def _group_of(path: str) -> str | None:
    text = (Path(__file__).parents[1] / path).read_text(encoding="utf-8")
    for fixture, number in GROUPS.items():
        if re.search(rf"def \w+\([^)]*\b{fixture}\b", text):  # as an argument, and not as a word
            return f"{fixture}-{zlib.crc32(path.encode()) % number}"
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFixture:
    return ByFixture(config, log)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Pool of worker processes: ``ranks.run(4, function, argument)`` gives four results."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Settings file beside a corpus and its vocabulary."""
    return make_data(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def finished_run(data, tmp_path_factory) -> Path:
    """Folder of a run of 20 steps at tensor 2 x pipeline 2 with dropout, with checkpoints at 10 and 20."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.microbatch=2"]
    succeeded(pretrain(data, f"run.directory={folder}", *layout, processes=4))
    return folder
