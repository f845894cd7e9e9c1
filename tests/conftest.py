from collections.abc import Iterator

import pytest

from tests.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Pool of worker processes: ``ranks.run(4, function, argument)`` gives four results."""
    pool = RankPool()
    yield pool
    pool.close()
