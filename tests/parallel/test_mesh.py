"""Arithmetic of the mesh, and that the communicators join the ranks that it says."""

import pytest
import torch
import torch.distributed as dist

from megatron_bert_tp.errors import LayoutError
from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.parallel.mesh import Axis, MeshShape, ParallelMesh
from tests.support import TIMEOUT, Layout, build_mesh

SHAPES = [MeshShape(p, d, t) for p in (1, 2, 3, 4) for d in (1, 2, 3) for t in (1, 2, 4)]
AXES = ("data", "pipeline", "tensor", "tied")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_places_are_the_world(shape):
    world = shape.pipeline * shape.data * shape.tensor
    places = [shape.place_of(rank) for rank in range(world)]
    assert len(set(places)) == world
    assert [shape.rank_at(*place) for place in places] == list(range(world))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["data", "pipeline", "tensor"])
def test_lines_of_an_axis_are_a_partition_of_the_world(shape, name):
    lines = list(shape.lines(name))
    world = shape.pipeline * shape.data * shape.tensor
    assert sorted(rank for line in lines for rank in line) == list(range(world))
    assert {len(line) for line in lines} == {getattr(shape, name)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["data", "pipeline", "tensor"])
def test_places_along_a_line_differ_only_in_its_axis(shape, name):
    varying = ("pipeline", "data", "tensor").index(name)
    for line in shape.lines(name):
        places = [shape.place_of(rank) for rank in line]
        assert [place[varying] for place in places] == list(range(len(line)))
        assert len({place[:varying] + place[varying + 1 :] for place in places}) == 1


def test_lines_of_two_by_two_by_two_as_drawn():
    """Tensor innermost, so that neighbours in rank share a node; pipeline outermost."""
    shape = MeshShape.of_world(8, tensor=2, pipeline=2)
    assert shape == MeshShape(pipeline=2, data=2, tensor=2)
    assert list(shape.lines("tensor")) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert list(shape.lines("data")) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert list(shape.lines("pipeline")) == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_only_the_two_ends_of_a_pipeline_are_tied():
    shape = MeshShape.of_world(8, tensor=2, pipeline=4)
    assert list(shape.lines("tied")) == [(0, 6), (1, 7)]
    assert list(MeshShape(1, 2, 2).lines("tied")) == [(0,), (1,), (2,), (3,)]


def test_world_that_does_not_divide_is_refused_with_the_way_out():
    with pytest.raises(LayoutError, match=r"world size \(6\).*2 x 2 = 4.*start 4 processes or a multiple"):
        MeshShape.of_world(6, tensor=2, pipeline=2)


def test_neighbours_form_a_ring():
    axis = Axis("pipeline", (1, 3, 5), 0)
    assert (axis.previous, axis.following) == (5, 3)
    assert (axis.is_first, axis.is_last, axis.size) == (True, False, 3)
    last = Axis("pipeline", (1, 3, 5), 2)
    assert (last.previous, last.following, last.is_last) == (3, 1, True)


def test_mesh_of_one_process_needs_no_group():
    mesh = ParallelMesh.alone()
    assert all(getattr(mesh, name) == Axis.alone(name) for name in AXES)


def sums_of_ranks() -> dict[str, tuple[tuple[int, ...], int, int]]:
    """By axis: its ranks, this rank's place, and what an all-reduce of rank numbers gives."""
    mesh = build_mesh(Layout(data=2, pipeline=2, tensor=2))
    axes = {name: getattr(mesh, name) for name in AXES}
    return {
        name: (axis.ranks, axis.rank, int(sum_over_(torch.tensor(1 << dist.get_rank()), axis)))
        for name, axis in axes.items()
    }


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, []),
        (2, [(0, 1), (1, 0)]),
        (3, [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]),
        (4, [(0, 1), (0, 3), (1, 0), (1, 2), (2, 1), (2, 3), (3, 0), (3, 2)]),
    ],
)
def test_neighbours_on_a_ring_as_drawn(size, expected):
    assert MeshShape(pipeline=size, data=1, tensor=1).neighbours() == expected


def ranks_of_channels() -> dict[tuple[int, int], list[int]]:
    mesh = build_mesh(Layout(data=2, pipeline=4))
    assert len(set(map(id, mesh.channels.values()))) == len(mesh.channels), "one communicator for two directions"
    return {ends: dist.get_process_group_ranks(group) for ends, group in mesh.channels.items()}


def test_each_direction_between_neighbours_has_its_own_communicator(ranks):
    shape = MeshShape(pipeline=4, data=2, tensor=1)
    for rank, found in enumerate(ranks.run(8, ranks_of_channels)):
        place, replica, _ = shape.place_of(rank)
        assert found == {
            (source, target): sorted((shape.rank_at(source, replica, 0), shape.rank_at(target, replica, 0)))
            for source, target in shape.neighbours()
            if place in (source, target)
        }


def test_communicators_join_the_ranks_of_their_line(ranks):
    shape = MeshShape(pipeline=2, data=2, tensor=2)
    for rank, found in enumerate(ranks.run(8, sums_of_ranks)):
        for name in AXES:
            line = next(line for line in shape.lines(name) if rank in line)
            assert found[name] == (line, line.index(rank), sum(1 << member for member in line))


def ranks_of_middle_stage() -> tuple[int, ...]:
    shape = MeshShape.of_world(3, tensor=1, pipeline=3)
    return ParallelMesh.build(shape, rank=dist.get_rank(), timeout=TIMEOUT).tied.ranks


def test_a_stage_between_the_ends_is_tied_to_nobody(ranks):
    assert ranks.run(3, ranks_of_middle_stage) == [(0, 2), (1,), (0, 2)]
