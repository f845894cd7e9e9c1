"""Random bits against a plain implementation of Philox4x64-10, and their independence of any layout."""

import math
import struct

import numpy as np
import pytest
import torch

from megatron_bert_tp.parallel.random_bits import Place, RandomBits, dropped_share, keep_mask

WORD = (1 << 64) - 1
# Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": multipliers, and key increments.
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
INCREMENTS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
SEED = 0xDEADBEEF12345678
PLACE = Place.MLP_OUTPUT


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x64-10."""
    a, b, c, d = counter
    first, second = key
    for _ in range(10):
        left, right = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = right >> 64 ^ b ^ first, right & WORD, left >> 64 ^ d ^ second, left & WORD
        first, second = first + INCREMENTS[0] & WORD, second + INCREMENTS[1] & WORD
    return a, b, c, d


def plain_lane(seed: int, sample: int, layer: int, place: int, element: int) -> int:
    """The signed 16-bit lane of one element by its definition."""
    words = philox((element >> 4, sample, layer << 8 | place, 0), (seed, 0))
    lanes = struct.unpack("<16h", struct.pack("<4Q", *words))
    return lanes[element & 15]


def plain_lanes(sample: int, *, layer: int, place: Place, start: int, count: int) -> list[int]:
    return [plain_lane(SEED, sample, layer, place, start + number) for number in range(count)]


def test_plain_philox_gives_the_published_known_answers():
    """From the known-answer file of the authors' Random123 library."""
    assert philox((0, 0, 0, 0), (0, 0)) == (
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    )


@pytest.mark.parametrize(
    ("sample", "layer", "place", "start", "count"),
    [
        (0, 0, Place.EMBEDDINGS, 0, 50),  # the block before counter zero is all ones
        (1, 0, Place.EMBEDDINGS, 0, 16),
        (7, 3, Place.ATTENTION_PROBABILITIES, 5, 1),
        (7, 3, Place.ATTENTION_OUTPUT, 13, 40),
        (2**40 + 3, 95, Place.MLP_OUTPUT, 16 * 2**33 + 9, 33),
    ],
)
def test_lanes_equal_plain_philox(sample, layer, place, start, count):
    found = RandomBits(SEED, (sample,)).lanes(sample, layer=layer, place=place, start=start, count=count)
    assert found.tolist() == plain_lanes(sample, layer=layer, place=place, start=start, count=count)


def test_lanes_of_a_slice_are_the_slice_of_the_whole():
    bits = RandomBits(SEED, (5,))
    whole = bits.lanes(5, layer=2, place=PLACE, start=0, count=200)
    for start, stop in ((0, 1), (15, 17), (16, 32), (31, 200), (199, 200)):
        part = bits.lanes(5, layer=2, place=PLACE, start=start, count=stop - start)
        assert np.array_equal(part, whole[start:stop])


def test_hidden_lanes_are_numbered_by_position_and_feature():
    """An odd number of features, so that rows begin inside a block."""
    lanes = RandomBits(SEED, (3, 9)).hidden(4, PLACE, positions=5, features=7)
    assert lanes.shape == (2, 5, 7)
    for row, sample in enumerate((3, 9)):
        assert lanes[row].flatten().tolist() == plain_lanes(sample, layer=4, place=PLACE, start=0, count=35)


def test_attention_lanes_are_numbered_by_head_query_and_key():
    """Element = (head x maximal positions + query) x maximal positions + key, whatever the padded length."""
    longest, layer, head, query, key = 12, 1, 2, 4, 3
    lanes = RandomBits(SEED, (6,)).attention(layer, heads=range(3), positions=5, max_positions=longest)
    assert lanes.shape == (1, 3, 5, 5)
    element = (head * longest + query) * longest + key
    place = Place.ATTENTION_PROBABILITIES
    assert lanes[0, head, query, key] == plain_lane(SEED, 6, layer, place, element)


@pytest.mark.parametrize("positions", [1, 7, 24])
def test_heads_of_a_rank_see_the_slice_of_all_heads(positions):
    bits = RandomBits(SEED, (1, 2))
    sizes = {"positions": positions, "max_positions": 24}
    whole = bits.attention(3, heads=range(4), **sizes)
    for heads in (range(2), range(2, 4), range(3, 4)):
        assert torch.equal(bits.attention(3, heads=heads, **sizes), whole[:, heads.start : heads.stop])


def test_padded_length_does_not_matter():
    bits = RandomBits(SEED, (1, 2))
    whole = bits.attention(3, heads=range(4), positions=24, max_positions=24)
    short = bits.attention(3, heads=range(4), positions=7, max_positions=24)
    assert torch.equal(short, whole[:, :, :7, :7])
    hidden = bits.hidden(3, PLACE, positions=24, features=10)
    assert torch.equal(bits.hidden(3, PLACE, positions=7, features=10), hidden[:, :7])


def test_samples_of_a_batch_are_drawn_apart():
    both = RandomBits(SEED, (8, 4)).hidden(0, PLACE, positions=3, features=6)
    for row, sample in enumerate((8, 4)):
        alone = RandomBits(SEED, (sample,)).hidden(0, PLACE, positions=3, features=6)
        assert torch.equal(both[row], alone[0])


ROWS, SEQUENCE, FEATURES = 3, 5, 6
RUNS = [range(8), range(4, 8), range(3, 4), range(5, 15), range(14, 19), range(15, 20)]


@pytest.mark.parametrize("lengths", [None, (4, 7, 2)], ids=["rows", "packed"])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_lanes_of_a_run_of_tokens_are_the_slice_of_the_whole(lengths, run):
    bits = RandomBits(SEED, (8, 4, 9), lengths)
    sequence = SEQUENCE if lengths is None else ROWS * SEQUENCE
    whole = bits.hidden(2, PLACE, positions=sequence, features=FEATURES).view(-1, FEATURES)
    found = bits.of_run(run, sequence=sequence).hidden(2, PLACE, positions=len(run), features=FEATURES)
    assert found.shape == (1, len(run), FEATURES)
    inside = whole[run.start : run.stop]
    assert torch.equal(found[0, : len(inside)], inside)
    assert (found[0, len(inside) :] == 32767).all(), "padding is kept"


def test_a_run_of_half_of_the_tokens_draws_half_of_the_lanes(monkeypatch):
    drawn = []
    lanes = RandomBits.lanes

    def counted(self, sample, **options):
        drawn.append(options["count"])
        return lanes(self, sample, **options)

    monkeypatch.setattr(RandomBits, "lanes", counted)
    bits = RandomBits(SEED, (8, 4, 9)).of_run(range(8), sequence=SEQUENCE)
    bits.hidden(2, PLACE, positions=8, features=FEATURES)
    assert drawn == [5 * FEATURES, 3 * FEATURES]


def test_attention_and_the_bits_of_samples_know_nothing_of_a_run():
    bits = RandomBits(SEED, (8, 4, 9))
    split = bits.of_run(range(8), sequence=SEQUENCE)
    sizes = {"heads": range(2), "positions": SEQUENCE, "max_positions": 7}
    assert torch.equal(split.attention(1, **sizes), bits.attention(1, **sizes))
    assert split.of_samples() == bits


def test_seed_sample_layer_and_place_all_change_the_bits():
    base = {"seed": SEED, "sample": 1, "layer": 1, "place": Place.ATTENTION_OUTPUT}
    changes = [{}, {"seed": SEED + 1}, {"sample": 2}, {"layer": 2}, {"place": Place.MLP_OUTPUT}]
    drawn = set()
    for change in changes:
        seed, sample, layer, place = (base | change).values()
        lanes = RandomBits(seed, (sample,)).lanes(sample, layer=layer, place=place, start=0, count=32)
        drawn.add(tuple(lanes.tolist()))
    assert len(drawn) == len(changes)


def test_drawing_again_gives_the_same_bits():
    bits = RandomBits(SEED, (1,))
    first = bits.hidden(0, PLACE, positions=4, features=8)
    bits.hidden(1, PLACE, positions=4, features=8)
    assert torch.equal(bits.hidden(0, PLACE, positions=4, features=8), first)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_share_of_kept_elements(probability):
    """Five standard deviations of a binomial, around the share that the 16-bit threshold realises."""
    count = 1 << 20
    lanes = RandomBits(SEED, (1,)).lanes(1, layer=0, place=PLACE, start=0, count=count)
    kept = keep_mask(torch.from_numpy(lanes.copy()), probability).double().mean().item()
    assert abs(dropped_share(probability) - probability) <= 2**-17
    assert abs(kept - (1 - dropped_share(probability))) < 5 * math.sqrt(probability * (1 - probability) / count)


def test_an_element_is_kept_where_its_lane_reaches_the_threshold():
    threshold = round(0.1 * 65536) - 32768
    lanes = torch.tensor([-32768, threshold - 1, threshold, 0, 32767], dtype=torch.int16)
    assert keep_mask(lanes, 0.1).tolist() == [0, 0, 1, 1, 1]
