"""The world size must fit the layout, and the global batch must fit both."""

import itertools
from collections.abc import Callable

import pytest

from megatron_bert_tp.config.load import check_world
from megatron_bert_tp.config.rule import divisors
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.errors import ConfigError

Load = Callable[..., Config]
Complaint = Callable[..., str]


@pytest.mark.parametrize("world", [4, 8, 16, 32])
def test_world_sizes_that_fit_are_accepted(load: Load, world: int):
    assert load(world=world) == load()


@pytest.mark.parametrize("world", [1, 2, 3, 5, 6, 7, 9])
def test_world_size_that_is_no_multiple_of_the_layout_is_told_with_sizes_that_work(
    complaint: Complaint, world: int
):
    message = complaint(world=world)
    assert message.startswith("1 problem ")
    assert (
        f"world size = {world}\n      must be a multiple of 4 = parallel.tensor (2) x parallel.pipeline (2)"
        in message
    )
    assert "4, 8 or 16 processes" in message
    assert "--nproc_per_node=4" in message


def test_global_batch_that_is_no_multiple_of_microbatch_and_data_size_gets_near_values(complaint: Complaint):
    message = complaint(world=12)
    assert "optimizer.global_batch = 64" in message
    assert "must be a multiple of 24 = parallel.microbatch (8) x data size (3)" in message
    assert "use 48 or 72" in message


def test_global_batch_below_one_microbatch_per_replica_gets_the_least_that_works(complaint: Complaint):
    message = complaint({}, "optimizer.global_batch=8", world=8)
    assert "-> use 16, or parallel.microbatch: 1, 2, 4\n" in message + "\n"


def test_unknown_world_size_checks_the_microbatch_alone(load: Load, complaint: Complaint):
    assert load({"parallel.microbatch": "64"})
    assert "multiple of 48" in complaint({"parallel.microbatch": "48"})


def test_check_world_tells_of_a_loaded_config(load: Load):
    config = load()
    assert check_world(config, 4) == []
    assert [problem.path for problem in check_world(config, 6)] == ["world size"]
    assert [problem.path for problem in check_world(config, 12)] == ["optimizer.global_batch"]


def test_every_layout_is_accepted_exactly_when_the_numbers_divide(load: Load):
    for tensor, pipeline, microbatch, world in itertools.product((1, 2, 4), (1, 2, 5), (1, 3, 8), (1, 4, 8, 20)):
        overrides = (
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.microbatch={microbatch}",
        )
        replicas, rest = divmod(world, tensor * pipeline)
        fits = rest == 0 and 64 % (microbatch * replicas) == 0
        try:
            load({}, *overrides, world=world)
        except ConfigError:
            assert not fits, overrides
        else:
            assert fits, overrides


@pytest.mark.parametrize("number", range(1, 60))
def test_divisors_are_all_numbers_that_divide(number: int):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
