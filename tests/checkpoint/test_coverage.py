"""Rectangles cover a tensor exactly once, or it is said that they do not; and no list of them costs much."""

import random
import time
from math import prod

import numpy as np
import pytest

from megatron_bert_tp.checkpoint.manifest import FileRecord, Manifest
from megatron_bert_tp.checkpoint.slices import Slice, check_coverage
from megatron_bert_tp.errors import CheckpointError

SHAPES = [(), (1,), (7,), (4, 5), (1, 9), (3, 4, 2)]


def slices_of(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Slice]:
    return [Slice("a", shape, begin, extent, "float32", "file") for begin, extent in boxes]


def cut(draw: random.Random, begin: tuple[int, ...], extent: tuple[int, ...], left: int):
    """A box, cut at random into some boxes."""
    longer = [dim for dim, size in enumerate(extent) if size > 1]
    if not left or not longer:
        return [(begin, extent)]
    dim = draw.choice(longer)
    at = draw.randrange(1, extent[dim])
    first = (*extent[:dim], at, *extent[dim + 1 :])
    rest = (*extent[:dim], extent[dim] - at, *extent[dim + 1 :])
    second = (*begin[:dim], begin[dim] + at, *begin[dim + 1 :])
    return [*cut(draw, begin, first, left - 1), *cut(draw, second, rest, left - 1)]


def covers(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """By painting: the truth that the corners are compared with."""
    painted = np.zeros(shape, int)
    for begin, extent in boxes:
        painted[tuple(slice(b, b + e) for b, e in zip(begin, extent, strict=True))] += 1
    return bool((painted == 1).all())


def is_accepted(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    try:
        check_coverage(slices_of(shape, boxes))
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_accepted_is_what_paints_every_number_once(shape):
    draw, answers = random.Random(str(shape)), set()
    for _ in range(300):
        boxes = cut(draw, (0,) * len(shape), shape, draw.randrange(4))
        change = draw.randrange(4)
        if change == 1:
            boxes.pop(draw.randrange(len(boxes)))
        if change == 2:
            boxes.append(draw.choice(boxes))
        if change == 3:  # as many numbers as there should be, but somewhere else
            _, extent = boxes.pop(draw.randrange(len(boxes)))
            boxes.append((tuple(draw.randrange(n - e + 1) for n, e in zip(shape, extent, strict=True)), extent))
        if boxes:
            expected = covers(shape, boxes)
            assert is_accepted(shape, boxes) == expected, boxes
            answers.add(expected)
    assert answers == {True, False}


def test_twenty_thousand_rectangles_of_a_tensor_are_checked_at_once():
    """Compared pair by pair they would take many minutes."""
    boxes = [((row, column), (1, 1)) for row in range(100) for column in range(200)]
    started = time.perf_counter()
    assert is_accepted((100, 200), boxes)
    assert not is_accepted((100, 200), [*boxes[:-1], boxes[0]])
    assert time.perf_counter() - started < 20


def test_a_shape_that_its_file_has_no_room_for_is_refused(tmp_path):
    """Four TB of float32 in a file of 100 bytes: nothing of that size is allocated."""
    rows = tuple(slices_of((2**40,), [((0,), (2**40,))]))
    assert prod(rows[0].shape) * 4 == 2**42
    manifest = Manifest(1, {}, {"file": FileRecord(100, "0" * 64)}, (), rows)
    (tmp_path / "manifest.json").write_text(manifest.dump())
    with pytest.raises(CheckpointError, match=r"rectangles in file have 4398046511104 bytes, the file only 100"):
        Manifest.read(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("slice_", "message"),
    [
        (Slice("a", (2,) * 5, (0,) * 5, (2,) * 5, "float32", "file"), "shape of a slice has 5 numbers"),
        (Slice("a" * 1001, (1,), (0,), (1,), "float32", "file"), "slice 'aaaa"),
        (Slice("a", (2**54,), (0,), (2**54,), "float32", "file"), "shape must be a number from 0 on, not 18014"),
    ],
)
def test_numbers_that_no_checkpoint_has_are_refused(tmp_path, slice_, message):
    manifest = Manifest(1, {}, {"file": FileRecord(100, "0" * 64)}, (), (slice_,))
    (tmp_path / "manifest.json").write_text(manifest.dump())
    with pytest.raises(CheckpointError, match=message):
        Manifest.read(tmp_path / "manifest.json")
