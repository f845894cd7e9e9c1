"""All nine classes give the outputs, losses and gradients of `transformers`, in one process and sharded."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.family.cases import ARCHITECTURES, setups_of
from tests.family.passes import (
    Bounds,
    RankAnswer,
    differences,
    guarded,
    idle_gradients,
    joined,
    load,
    make_call,
    mesh_of,
    on_ranks,
)
from tests.sources import assert_none

if TYPE_CHECKING:
    from tests.family.reference import Reference

SIZES = (1, 2, 4)
# Gradients that cancel are sums over up to 99 tokens, each rounded to the precision of the largest gradient.
BOUNDS = {
    torch.float64: Bounds(outputs=1e-10, gradients=1e-10, idle=1e-12),
    torch.float32: Bounds(outputs=1e-5, gradients=1e-4, idle=100 * torch.finfo(torch.float32).eps),
}

Key = tuple[torch.dtype, str, str]


def run_class(size: int, architecture: str, folder: Path) -> dict[Key, RankAnswer | str]:
    """Every call of every setup, on this rank.

    In float64 all; in float32, of which a rank rounds like one process, sharded ones of the first setup only.
    """
    mesh = mesh_of(size)
    found: dict[Key, RankAnswer | str] = {}
    for dtype in BOUNDS:
        setups = setups_of(architecture)
        for setup in setups if size == 1 or dtype == torch.float64 else setups[:1]:
            model = guarded(load, architecture, folder / setup.name, mesh, dtype)
            for name, call in setup.calls.items():
                is_loaded = not isinstance(model, str)
                answer = guarded(make_call, model, call, dtype) if is_loaded else model
                found[dtype, setup.name, name] = answer
    return found


@pytest.fixture(scope="module")
def reference_of(tmp_path_factory) -> "Callable[[str], Reference]":
    from tests.family.reference import refer  # the worker processes have no need of transformers

    known = {}

    def reference_of(architecture: str) -> "Reference":
        if architecture not in known:
            folder = tmp_path_factory.mktemp(architecture)
            known[architecture] = refer(architecture, setups_of(architecture), folder)
        return known[architecture]

    return reference_of


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_losses_and_gradients_equal_transformers(ranks, reference_of, architecture, size):
    reference = reference_of(architecture)
    answers = on_ranks(ranks, size, run_class, architecture, reference.directory)
    problems = []
    for key in answers[0]:
        dtype, *call = key
        found = guarded(joined, [answer[key] for answer in answers])
        idle = idle_gradients(reference.answers[torch.float64][tuple(call)].gradients)
        told = differences(found, reference.answers[dtype][tuple(call)], BOUNDS[dtype], idle)
        problems += [f"{dtype} {' / '.join(call)}: {line}" for line in told]
    assert_none(problems)
