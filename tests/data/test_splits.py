import tracemalloc

import numpy as np
import pytest

from megatron_bert_tp.data.samples.splits import PART_NAMES, part_of, split_documents
from megatron_bert_tp.errors import DataError


@pytest.mark.parametrize("num_documents", [3, 7, 100, 12345])
@pytest.mark.parametrize("shares", [(96.0, 4.0, 0.0), (1.0, 1.0, 1.0), (949.0, 50.0, 1.0), (1.0, 0.0, 0.0)])
def test_each_document_is_in_exactly_one_part(num_documents, shares):
    parts = split_documents(num_documents, shares)
    assert np.sort(np.concatenate(parts)).tolist() == list(range(num_documents))
    for part, share in zip(parts, shares, strict=True):
        assert (len(part) > 0) == (share > 0)
        assert part.tolist() == sorted(part)


def test_parts_have_their_shares():
    assert [len(part) for part in split_documents(1000, (96.0, 4.0, 0.0))] == [960, 40, 0]
    assert [len(part) for part in split_documents(10, (96.0, 2.0, 2.0))] == [8, 1, 1]


def test_parts_are_spread_over_the_corpus():
    """The mean of 400 of 10,000 numbers has standard deviation 2887 / sqrt(400) = 144; 5 sigma."""
    validation = split_documents(10_000, (96.0, 4.0, 0.0))[1]
    assert abs(validation.mean() - 5000) < 5 * 144
    assert np.diff(validation).max() > 1


@pytest.mark.parametrize(
    ("num_documents", "shares"), [(1, (1.0, 1.0, 0.0)), (0, (1.0, 0.0, 0.0)), (5, (0.0, 0.0, 0.0))]
)
def test_too_few_documents_for_the_parts_are_refused(num_documents, shares):
    with pytest.raises(DataError, match=f"the corpus has {num_documents} documents"):
        split_documents(num_documents, shares)


def test_a_part_knows_its_documents_one_by_one():
    shares = (90.0, 8.0, 2.0)
    lists = split_documents(5000, shares)
    some = np.random.default_rng(0).permutation(5000)[:1000]
    for name, listed in zip(PART_NAMES, lists, strict=True):
        part = part_of(5000, shares, name)
        assert len(part) == len(listed)
        assert part.documents().tolist() == listed.tolist()
        assert part.contains(some).tolist() == np.isin(some, listed).tolist()


def test_a_part_takes_no_memory():
    tracemalloc.start()
    part = part_of(400_000_000, (96.0, 4.0, 0.0), "validation")
    assert part.contains(np.arange(1000)).sum() < 100
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert len(part) == 16_000_000
