"""Runs to which nothing happens: what the others are compared with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.runs import launch


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory) -> Callable[..., Path]:
    """``whole("parallel.tensor=2", processes=2)``: folder of a finished run, not to be changed."""
    runs: dict[object, Path] = {}

    def run_of(*overrides: str, processes: int = 2) -> Path:
        key = (processes, *overrides)
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole") / "run"
            ended = launch(data, folder, *overrides, processes=processes)
            assert (ended.code, ended.outcome["code"]) == (0, 0), ended.output
            runs[key] = folder
        return runs[key]

    return run_of
