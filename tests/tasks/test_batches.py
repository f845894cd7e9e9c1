"""Microbatches of a task hold the rows of its table, each once an epoch, and each once in an evaluation."""

import pickle
from dataclasses import fields, replace
from itertools import chain

import numpy as np
import pytest
import torch

from megatron_bert_tp.data.loader import Loading, StepLoader
from megatron_bert_tp.data.packing import Cutting
from megatron_bert_tp.data.samples.sampler import SampleOrder
from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.objectives.label_losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from megatron_bert_tp.tasks.batches import TaskBatch, TaskBatches
from megatron_bert_tp.tasks.feature_table import FeatureTable
from megatron_bert_tp.tasks.task import Kind
from tests.data.corpora import Even

PAD = 7
LONGEST = 60
PACKINGS = {"none": 6, "bins": 5 * 64 * 3, "packed": 5 * 64 * 3}
"""Size of a microbatch by packing; tokens are enough for five samples of three choices."""


def make_table(kind: Kind, num_samples: int, *, seed: int = 0, is_labelled: bool = True) -> FeatureTable:
    """Rows of 3 to 60 tokens, each of which is there once, so that a token tells its row."""
    draws = np.random.default_rng(seed)
    per_sample = 3 if kind is Kind.CHOICE else 1
    lengths = draws.integers(3, LONGEST + 1, num_samples * per_sample)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    num_tokens = int(bounds[-1])
    labels = {
        Kind.CLASS: lambda: draws.integers(0, 4, num_samples),
        Kind.CHOICE: lambda: draws.integers(0, 3, num_samples),
        Kind.CLASSES: lambda: draws.integers(0, 2, (num_samples, 5)).astype(np.float32),
        Kind.NUMBER: lambda: draws.random(num_samples),
        Kind.ANSWER: lambda: draws.integers(0, 3, (num_samples, 2)),
        Kind.TAGS: lambda: draws.integers(-1, 4, num_tokens),
    }[kind]()
    return FeatureTable(
        kind=kind,
        ids=np.arange(100, 100 + num_tokens, dtype=np.int32),
        types=draws.integers(0, 2, num_tokens).astype(np.uint8),
        bounds=bounds,
        examples=np.arange(num_samples),
        rows_per_sample=per_sample,
        labels=labels if is_labelled else None,
    )


def make_batches(
    table: FeatureTable, packing: str, *, step: int = 24, data_rank: int = 0, data_size: int = 1, **more
):
    settings = {"sequence_length": LONGEST, "seed": 5, "global_batch": step, **more}
    size = settings.pop("size", PACKINGS[packing])
    cutting = Cutting(packing=packing, size=size, data_rank=data_rank, data_size=data_size)
    return TaskBatches(table, PAD, cutting=cutting, **settings)


def row_of(table: FeatureTable, row: int, name: str) -> list[int]:
    return getattr(table, name)[table.bounds[row] : table.bounds[row + 1]].tolist()


def samples_of(table: FeatureTable, batch: TaskBatch) -> list[int]:
    """Samples of a microbatch, by its first tokens."""
    if not batch.num_tokens:
        return []
    if batch.packed_lengths is None:
        firsts = batch.input_ids[:, 0].numpy()
    else:
        firsts = batch.input_ids[0].numpy()[np.cumsum([0, *batch.packed_lengths])[:-1]]
    rows = np.searchsorted(table.bounds, firsts - 100)
    assert (table.bounds[rows] == firsts - 100).all()
    assert (rows[:: table.rows_per_sample] % table.rows_per_sample == 0).all()
    return (rows[:: table.rows_per_sample] // table.rows_per_sample).tolist()


def same(one: TaskBatch, other: TaskBatch) -> bool:
    values = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(TaskBatch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in values)


@pytest.mark.parametrize("packing", ["none", "bins"])
@pytest.mark.parametrize("kind", Kind)
def test_padded_rows_are_those_of_the_table(kind, packing):
    table = make_table(kind, 40)
    for batch in make_batches(table, packing).take(0):
        samples = samples_of(table, batch)
        rows = [sample * table.rows_per_sample + n for sample in samples for n in range(table.rows_per_sample)]
        lengths = [len(row_of(table, row, "ids")) for row in rows]
        width = min(-(-max(lengths) // 8) * 8, LONGEST)
        padding = [width - length for length in lengths]

        def padded(name, value, *, rows=rows, padding=padding):
            return [row_of(table, row, name) + [value] * p for row, p in zip(rows, padding, strict=True)]

        assert batch.input_ids.tolist() == padded("ids", PAD)
        assert batch.token_type_ids.tolist() == padded("types", 0)
        mask = [[True] * length + [False] * p for length, p in zip(lengths, padding, strict=True)]
        assert (batch.attention_mask is None) == (not any(padding))
        assert batch.attention_mask is None or batch.attention_mask.tolist() == mask
        assert (batch.num_tokens, batch.packed_lengths, batch.position_ids) == (sum(lengths), None, None)
        if kind is Kind.TAGS:
            assert batch.labels.tolist() == padded("labels", -100)
        elif kind is Kind.ANSWER:
            assert batch.labels is None
            found = torch.stack([batch.start_positions, batch.end_positions], 1)
            assert found.tolist() == table.labels[samples].tolist()
        else:
            assert batch.labels.tolist() == table.labels[samples].tolist()
            assert batch.labels.dtype == torch.from_numpy(table.labels).dtype


@pytest.mark.parametrize("kind", Kind)
def test_packed_rows_are_the_padded_ones_without_their_padding(kind):
    table = make_table(kind, 40)
    step = make_batches(table, "packed", step=30).take(0)
    visited = SampleOrder(40, 5).spans(np.arange(30)).tolist()
    assert sorted(chain.from_iterable(samples_of(table, batch) for batch in step)) == sorted(visited)
    for batch in step:
        samples = np.array(samples_of(table, batch))
        numbers = np.array(batch.sample_numbers)[:: table.rows_per_sample] // table.rows_per_sample
        apart = make_batches(table, "none").batch(samples, numbers)
        is_real = torch.ones_like(apart.input_ids, dtype=torch.bool)
        is_real = is_real if apart.attention_mask is None else apart.attention_mask
        lengths = is_real.sum(1).tolist()
        total, width = sum(lengths), batch.input_ids.shape[1]
        assert width == -(-total // 8) * 8 <= PACKINGS["packed"]
        rest = width - total
        assert batch.input_ids.tolist() == [apart.input_ids[is_real].tolist() + [PAD] * rest]
        assert batch.token_type_ids.tolist() == [apart.token_type_ids[is_real].tolist() + [0] * rest]
        assert batch.position_ids.tolist() == [[n for length in lengths for n in range(length)] + [0] * rest]
        assert (batch.attention_mask, batch.packed_lengths) == (None, tuple(lengths))
        assert (batch.sample_numbers, batch.num_tokens) == (apart.sample_numbers, apart.num_tokens)
        if kind is Kind.TAGS:
            assert batch.labels.tolist() == [apart.labels[is_real].tolist() + [-100] * rest]
        else:
            for name in ("labels", "start_positions", "end_positions"):
                one, other = getattr(batch, name), getattr(apart, name)
                assert (one is other is None) or torch.equal(one, other)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_order_of_training_is_a_permutation_for_each_epoch_that_seed_and_samples_decide(packing):
    """Steps of 24 samples out of 40, so that steps lie over the end of an epoch."""
    table = make_table(Kind.CHOICE, 40)
    found: dict[int, int] = {}
    for done in range(0, 120, 24):
        for batch in make_batches(table, packing).take(done):
            samples = samples_of(table, batch)
            numbers = np.reshape(batch.sample_numbers, (-1, 3))
            assert (numbers % 3 == [0, 1, 2]).all()
            assert (numbers // 3 == numbers[:, :1] // 3).all()
            found.update(zip((numbers[:, 0] // 3).tolist(), samples, strict=True))
    assert sorted(found) == list(range(120))
    visited = [found[number] for number in range(120)]
    assert visited == SampleOrder(40, 5).spans(np.arange(120)).tolist()
    for epoch in range(3):
        assert sorted(visited[40 * epoch : 40 * epoch + 40]) == list(range(40))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_run_that_goes_on_in_an_epoch_takes_what_it_would_have_taken(packing):
    table = make_table(Kind.CLASS, 50)
    whole = make_batches(table, packing, step=12)
    taken = {done: whole.take(done) for done in range(0, 120, 12)}
    fresh = make_batches(make_table(Kind.CLASS, 50), packing, step=12)
    for done in (84, 36):
        assert all(same(*pair) for pair in zip(taken[done], fresh.take(done), strict=True))
    other = make_batches(table, packing, step=12, seed=6).take(36)
    assert not all(same(*pair) for pair in zip(taken[36], other, strict=False))


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_microbatches_of_samples_in_order_do_not_depend_on_the_replicas(data_size):
    table = make_table(Kind.TAGS, 100)
    alone = make_batches(table, "none", step=48).take(48)
    dealt = [
        make_batches(table, "none", step=48, data_rank=r, data_size=data_size).take(48) for r in range(data_size)
    ]
    assert len(alone) == 8
    assert all(same(alone[n], dealt[n % data_size][n // data_size]) for n in range(8))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("data_size", [1, 2, 3])
def test_replicas_of_a_step_share_its_samples(packing, data_size):
    table = make_table(Kind.CHOICE, 30)
    steps = [
        make_batches(table, packing, step=20, data_rank=r, data_size=data_size).take(20) for r in range(data_size)
    ]
    assert len({len(step) for step in steps}) == 1
    numbers = [n for step in steps for batch in step if batch.num_tokens for n in batch.sample_numbers[::3]]
    assert sorted(numbers) == list(range(60, 120, 3))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("data_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 2, 40, 53])
@pytest.mark.parametrize("kind", [Kind.NUMBER, Kind.CHOICE])
def test_an_evaluation_has_every_sample_once_among_the_replicas(kind, packing, data_size, num_samples):
    table = make_table(kind, num_samples)
    seen, sizes = [], set()
    for rank in range(data_size):
        batches = make_batches(table, packing, data_rank=rank, data_size=data_size)
        made = batches.evaluation()
        told = make_batches(table, packing, data_size=data_size).evaluation_samples(rank)
        assert [samples.tolist() for samples in told] == [samples_of(table, batch) for batch in made]
        sizes.add(len(made))
        seen += [sample for samples in told for sample in samples.tolist()]
        for batch in made:
            if batch.num_tokens:
                choices = range(table.rows_per_sample)
                expected = [s * len(choices) + n for s in samples_of(table, batch) for n in choices]
                assert list(batch.sample_numbers) == expected
    assert sorted(seen) == list(range(num_samples))
    assert len(sizes) == 1


def test_many_samples_are_evaluated_once_in_every_packing():
    """More than are packed at once."""
    table = make_table(Kind.CLASS, 20_000)
    for packing in PACKINGS:
        told = [make_batches(table, packing, data_size=2).evaluation_samples(rank) for rank in (0, 1)]
        assert np.array_equal(np.sort(np.concatenate([*told[0], *told[1]])), np.arange(20_000))


@pytest.mark.parametrize("packing", PACKINGS)
def test_little_of_an_evaluation_is_padding(packing):
    """Rows are padded to a multiple of 8, by 3.5 tokens in the mean, and a little for their neighbours."""
    table = make_table(Kind.CLASS, 600)
    batches = [batch for batch in make_batches(table, packing).evaluation() if batch.num_tokens]
    share = 1 - sum(batch.num_tokens for batch in batches) / sum(batch.input_ids.numel() for batch in batches)
    assert share < (0.01 if packing == "packed" else (3.5 + 1) / table.lengths.mean())
    if packing == "none":
        for batch in batches:
            shortest = np.diff(table.bounds)[samples_of(table, batch)].min()
            assert shortest >= batch.input_ids.shape[1] - 8


@pytest.mark.parametrize("packing", ["bins", "packed"])
@pytest.mark.parametrize("kind", [Kind.CLASS, Kind.CHOICE])
def test_no_microbatch_is_larger_than_its_size_and_one_sample_fits_the_smallest(kind, packing):
    table = make_table(kind, 200)
    least = 64 * table.rows_per_sample
    for size in (least, least + 9, 5 * least):
        batches = make_batches(table, packing, step=100, size=size)
        for batch in [*batches.take(0), *batches.evaluation()]:
            assert 0 < batch.input_ids.numel() <= size
    with pytest.raises(ConfigError, match=rf"parallel.microbatch_tokens \({least - 1}\) must be at least {least}"):
        make_batches(table, packing, size=least - 1)


def test_rows_are_no_wider_than_the_sequence_length():
    table = make_table(Kind.CLASS, 200)
    assert max(batch.input_ids.shape[1] for batch in make_batches(table, "bins").evaluation()) == LONGEST == 60


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", Kind)
def test_a_microbatch_without_samples_has_something_to_compute_and_nothing_to_learn(kind, packing):
    table = make_table(kind, 1)
    (batch,) = make_batches(table, packing, data_rank=1, data_size=2).evaluation()
    rows = table.rows_per_sample
    assert batch.input_ids.tolist() == [[PAD] * 8] * rows
    assert batch.token_type_ids.tolist() == [[0] * 8] * rows
    assert (batch.attention_mask, batch.packed_lengths, batch.position_ids) == (None, None, None)
    assert (batch.sample_numbers, batch.num_tokens) == ((0,) * rows, 0)
    (full,) = make_batches(table, packing, data_rank=0, data_size=2).evaluation()
    losses = {Kind.NUMBER: SquaredError(), Kind.CLASSES: BinaryCrossEntropy()}
    for name in ("labels", "start_positions", "end_positions"):
        labels, of_a_sample = getattr(batch, name), getattr(full, name)
        assert (labels is None) == (of_a_sample is None)
        if labels is not None:
            assert losses.get(kind, CrossEntropy()).count(labels) == 0
            assert (labels.dtype, labels.dim()) == (of_a_sample.dtype, of_a_sample.dim())


def test_without_labels_nothing_is_to_be_learned():
    for kind in Kind:
        for batch in make_batches(make_table(kind, 5, is_labelled=False), "none", data_size=3).evaluation():
            assert (batch.labels, batch.start_positions, batch.end_positions) == (None, None, None)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_come_through_the_loader_as_they_are(num_workers):
    table = make_table(Kind.TAGS, 30)
    batches = make_batches(table, "packed")
    loading = Loading(num_workers=num_workers, pins_memory=False, timeout_seconds=60)
    loader = StepLoader(batches.take, size_of=Even(24), end=72, loading=loading)
    for done in (0, 24, 48):
        assert all(same(*pair) for pair in zip(loader.take(done), batches.take(done), strict=True))


def test_a_microbatch_stays_the_same_when_it_is_sent_on():
    batch = make_batches(make_table(Kind.ANSWER, 5), "none").evaluation()[0]
    assert same(pickle.loads(pickle.dumps(batch)), batch)
    assert same(batch.to(torch.device("cpu")), batch)
    assert not same(replace(batch, num_tokens=0), batch)
