from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool import RankPool
from tests.training.runs import make_data, pretrain, succeeded

# Tests that share a costly fixture run on one worker of pytest-xdist (`--dist loadgroup`): otherwise each
# worker makes its own. Two groups, so that two workers share the load.
GROUPS = ("finished_run", "ranks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in GROUPS:
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(fixture))
                break


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
