"""Ranks that hold the same values hold the same bits; one flipped bit is found, and the odd rank is named."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_bert_tp.errors import RanksDifferError
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.training.replicas import check_replicas, checksum, held_by_several, odd_weights
from tests.support import CPU, TIMEOUT, Layout, Recipe
from tests.test_layouts import DEEP, ENGINE, LAYOUTS, name_of
from tests.trainers import CORPUS_SHAPE, configure, trainer_of

RECIPE = Recipe(shape=CORPUS_SHAPE, dtype=torch.float32, num_steps=20, clip_norm=0.5)
BFLOAT16 = replace(RECIPE, dtype=torch.bfloat16)
SMALL_STEPS = ("optimizer.global_batch=4", "parallel.microbatch=1")
WORDS = "bert.embeddings.word_embeddings.weight"
NORM = "bert.encoder.layer.4.ln.weight"
WEIGHTS = odd_weights(CPU)


def sum_of(tensor: Tensor) -> int:
    return int(checksum(tensor, WEIGHTS))


def flipped(tensor: Tensor, byte: int, bit: int) -> Tensor:
    changed = tensor.clone()
    changed.view(-1).view(torch.uint8)[byte] ^= 1 << bit
    return changed


def test_every_single_flipped_bit_changes_the_checksum():
    tensor = torch.randn(5, 7)
    sums = {sum_of(flipped(tensor, byte, bit)) for byte in range(5 * 7 * 4) for bit in range(8)}
    assert len(sums | {sum_of(tensor)}) == 5 * 7 * 4 * 8 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_flipped_bit_anywhere_in_a_tensor_of_many_pieces_changes_the_checksum(dtype):
    tensor = torch.randn(99_991).to(dtype)
    draws = np.random.default_rng(1)
    # The first and the last bytes, those beside the borders of pieces, and some others.
    edge = 4 << 15
    size = tensor.numel() * tensor.itemsize
    places = [0, 1, edge - 1, edge, edge + 1, size - 2, size - 1, *draws.integers(0, size, 50).tolist()]
    truth = sum_of(tensor)
    assert all(sum_of(flipped(tensor, place, int(draws.integers(8)))) != truth for place in places)


def reference(content: bytes) -> int:
    """The checksum with Python's whole numbers."""
    modulus, golden = 1 << 64, 0x9E3779B97F4A7C15

    def scrambled(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % modulus
        value = (value ^ value >> 27) * 0x94D049BB133111EB % modulus
        return value ^ value >> 31

    words = [int.from_bytes(content[at : at + 4], "little", signed=True) for at in range(0, len(content), 4)]
    total = 0
    for piece in range(len(words) // 32768 + 1):
        run = words[32768 * piece : 32768 * (piece + 1)]
        part = sum(word * (scrambled((place + 1) * golden % modulus) | 1) for place, word in enumerate(run))
        total += scrambled((part + (piece + 1) * golden) % modulus)
    return total % modulus


@pytest.mark.parametrize("size", [1, 3, 32768, 70_001])
def test_checksum_is_the_formula_in_whole_numbers(size):
    tensor = torch.randn(size)
    assert sum_of(tensor) % (1 << 64) == reference(tensor.numpy().tobytes())


def test_exchanged_and_shifted_values_change_the_checksum():
    tensor = torch.randn(80_000)
    draws = np.random.default_rng(2)
    sums = {sum_of(tensor), sum_of(tensor.roll(1)), sum_of(tensor.roll(32768)), sum_of(tensor.flip(0))}
    for one, other in draws.integers(0, len(tensor), (200, 2)).tolist():
        exchanged = tensor.clone()
        exchanged[[one, other]] = tensor[[other, one]]
        sums.add(sum_of(exchanged))
    assert len(sums) == 204


def test_values_that_differ_in_their_sign_alone_cannot_be_exchanged_unseen():
    tensor = torch.ones(1000)
    sums = set()
    for place in range(1000):
        tensor[place] = -1
        sums.add(sum_of(tensor))
        tensor[place] = 1
    assert len(sums) == 1000


def test_bytes_decide_and_not_values():
    zeros = torch.zeros(10)
    assert sum_of(zeros) != sum_of(-zeros)
    nan = torch.full((10,), torch.nan)
    assert sum_of(nan) != sum_of(flipped(nan, 0, 0))
    assert torch.isnan(flipped(nan, 0, 0)).all()


def test_a_window_of_a_tensor_has_the_checksum_of_its_copy():
    tensor = torch.randn(9, 11).bfloat16()
    for window in (tensor[1:4], tensor[:, 3:8], tensor[0, 1:], tensor[2:3, :5]):
        assert sum_of(window) == sum_of(window.clone())


@dataclass(frozen=True)
class Flip:
    """A bit of what ``rank`` holds under ``name``."""

    rank: int
    name: str
    bit: int = 0


def find(settings: Path, recipe: Recipe, layout: Layout, flips: tuple[Flip, ...], *overrides: str) -> str | None:
    """What a rank is told after one step and the flips; None where all is well."""
    trainer = trainer_of(configure(settings, recipe, layout, *overrides), layout)
    agreement = Agreement.of_world(TIMEOUT)
    trainer.train_step()
    check_replicas(trainer.chunks, trainer.updater, trainer.mesh, agreement)
    for flip in flips:
        held = {each.name: each.tensor for each in held_by_several(trainer.chunks, trainer.updater, trainer.mesh)}
        if flip.rank == agreement.rank:
            held[flip.name].view(-1)[-1:].view(torch.uint8)[flip.bit // 8] ^= 1 << flip.bit % 8
    try:
        check_replicas(trainer.chunks, trainer.updater, trainer.mesh, agreement)
    except RanksDifferError as error:
        return str(error)
    return None


THREE = Layout(data=3)
BATCH_OF_THREE = ("optimizer.global_batch=6", "parallel.microbatch=1")
CASES = {
    "a parameter of one of three replicas": (
        THREE, RECIPE, Flip(1, f"parameter {NORM}"), f"parameter {NORM} of rank 1 differs from that of ranks 0, 2"
    ),
    "a moment of one of three replicas": (
        THREE, RECIPE, Flip(2, f"moment exp_avg_sq {NORM}", 31),
        f"moment exp_avg_sq {NORM} of rank 2 differs from that of ranks 0, 1",
    ),
    "a float32 weight behind a narrow parameter": (
        THREE, BFLOAT16, Flip(0, f"float32 weight {NORM}"),
        f"float32 weight {NORM} of rank 0 differs from that of ranks 1, 2",
    ),
    "what all of four tensor ranks have": (
        Layout(tensor=4), RECIPE, Flip(3, "parameter bert.encoder.layer.0.output.dense.bias", 22),
        "parameter bert.encoder.layer.0.output.dense.bias of rank 3 differs from that of ranks 0, 1, 2",
    ),
    "what both of two tensor ranks have": (
        Layout(tensor=2, sequence=True), RECIPE, Flip(1, "parameter bert.embeddings.position_embeddings.weight"),
        "parameter bert.embeddings.position_embeddings.weight differs between ranks 0, 1, of which none has a "
        "majority",
    ),
    "what two replicas of two tensor ranks have": (
        Layout(data=2, tensor=2), RECIPE, Flip(2, f"parameter {NORM}"),
        f"parameter {NORM} of rank 2 differs from that of ranks 0, 1, 3",
    ),
    "the half of a matrix that two replicas have": (
        Layout(data=2, tensor=2), RECIPE,
        Flip(3, "parameter bert.encoder.layer.1.output.dense.weight from column 18"),
        "parameter bert.encoder.layer.1.output.dense.weight from column 18 differs between ranks 1, 3, of which "
        "none has a majority",
    ),
    "tied words on the last stage": (
        Layout(pipeline=2), RECIPE, Flip(1, f"parameter {WORDS}"),
        f"parameter {WORDS} differs between ranks 0, 1, of which none has a majority",
    ),
    "tied words on the last stage of one of two replicas": (
        Layout(data=2, pipeline=2, shards=True), RECIPE, Flip(3, f"parameter {WORDS}"),
        f"parameter {WORDS} of rank 3 differs from that of ranks 0, 1, 2",
    ),
    "a moment of tied words, of the rows of one owner": (
        # 101 words: the second owner has those from row 51 on.
        Layout(data=2, pipeline=2, shards=True), RECIPE, Flip(1, f"moment exp_avg {WORDS} from row 51"),
        f"moment exp_avg {WORDS} from row 51 differs between ranks 1, 3, of which none has a majority",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_flipped_bit_is_found_and_all_ranks_name_tensor_and_odd_rank(ranks, data, case):
    layout, recipe, flip, wanted = case
    more = BATCH_OF_THREE if layout.data == 3 else SMALL_STEPS
    told = ranks.run(layout.world, find, data, recipe, layout, (flip,), *more)
    assert len(set(told)) == 1
    assert told[0].startswith(f"ranks that must hold the same values do not: {wanted}. Memory or a device has")


def test_at_most_five_tensors_are_named(ranks, data):
    names = (f"parameter bert.encoder.layer.{n}.attention.ln.{k}" for n in range(5) for k in ("weight", "bias"))
    flips = tuple(Flip(1, name) for name in names)
    told = ranks.run(3, find, data, RECIPE, THREE, flips, *BATCH_OF_THREE)
    assert len(set(told)) == 1
    assert told[0].count("of rank 1 differs from that of ranks 0, 2") == 5


def alarms(settings: Path, recipe: Recipe, layout: Layout, *overrides: str) -> tuple[int, list[int]]:
    """Steps without an alarm, and how many values were compared over data, tensor and tied ranks."""
    trainer = trainer_of(configure(settings, recipe, layout, *overrides), layout)
    agreement = Agreement.of_world(TIMEOUT)
    mesh = trainer.mesh
    for _ in range(recipe.num_steps):
        trainer.train_step()
        check_replicas(trainer.chunks, trainer.updater, mesh, agreement)
    held = list(held_by_several(trainer.chunks, trainer.updater, mesh))
    axes = mesh.data, mesh.tensor, mesh.tied
    return trainer.steps_done, [sum(any(axis is own for own in each.axes) for each in held) for axis in axes]


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [
        (Layout(data=2, pipeline=2), BFLOAT16),
        (Layout(tensor=2, sequence=True), RECIPE),
        (Layout(data=2, shards=True), BFLOAT16),
        (Layout(pipeline=2, schedule="interleaved", virtual=3), replace(DEEP, num_steps=20)),
        (Layout(tensor=2, recompute="selective"), RECIPE),
        (Layout(pipeline=2, schedule="zb-v", virtual=2), RECIPE),
    ],
    ids=lambda each: name_of(each) if isinstance(each, Layout) else str(each.dtype),
)
def test_twenty_steps_raise_no_alarm(ranks, data, layout, recipe):
    assert layout in (*LAYOUTS, *ENGINE)
    for done, (data_ranks, tensor_ranks, tied_ranks) in ranks.run(
        layout.world, alarms, data, recipe, layout, *SMALL_STEPS
    ):
        assert done == 20
        assert (data_ranks > 50) == (layout.data > 1)
        assert (tensor_ranks > 50) == (layout.tensor > 1)
        # The parameter and two moments, and the float32 weight; in a V both ends are on one rank.
        num_kinds = 4 if recipe is BFLOAT16 else 3
        assert tied_ranks == (num_kinds if layout.pipeline > 1 and layout.schedule != "zb-v" else 0)
