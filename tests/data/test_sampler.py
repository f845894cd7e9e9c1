import numpy as np
import pytest

from megatron_bert_tp.data.sampler import BatchShare, SampleOrder


def test_each_epoch_visits_every_span_once_in_another_order():
    order = SampleOrder(1000, seed=5)
    epochs = order.spans(np.arange(3000)).reshape(3, 1000)
    for epoch in epochs:
        assert np.sort(epoch).tolist() == list(range(1000))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0].tolist() != list(range(1000))


def test_order_depends_on_seed_and_number_alone():
    order, fresh = SampleOrder(100, seed=5), SampleOrder(100, seed=5)
    expected = [order.sample_at(n) for n in range(400)]
    numbers = np.random.default_rng(0).permutation(400)
    assert fresh.spans(numbers).tolist() == [expected[n][1] for n in numbers]
    assert [epoch for epoch, _ in expected] == [n // 100 for n in range(400)]
    assert SampleOrder(100, seed=6).spans(np.arange(100)).tolist() != [span for _, span in expected[:100]]


@pytest.mark.parametrize("microbatch", [1, 3, 6])
def test_microbatches_of_a_step_do_not_depend_on_the_number_of_data_ranks(microbatch):
    for step in range(3):
        alone = BatchShare(global_batch=36, microbatch=microbatch).numbers_from(36 * step)
        assert np.concatenate(alone).tolist() == list(range(36 * step, 36 * step + 36))
        for size in (2, 3):
            dealt = [
                BatchShare(global_batch=36, microbatch=microbatch, data_rank=rank, data_size=size).numbers_from(
                    36 * step
                )
                for rank in range(size)
            ]
            assert {len(numbers) for numbers in dealt} == {36 // microbatch // size}
            together = [microbatches[n] for n in range(len(dealt[0])) for microbatches in dealt]
            assert [m.tolist() for m in together] == [m.tolist() for m in alone]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_evaluation_covers_its_samples_once_with_a_short_last_microbatch(size):
    shares = [BatchShare(global_batch=8, microbatch=4, data_rank=rank, data_size=size) for rank in range(size)]
    dealt = [numbers for share in shares for numbers in share.numbers_of_evaluation(14)]
    assert sorted(len(numbers) for numbers in dealt) == [2, 4, 4, 4]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(14))
    assert shares[-1].numbers_of_evaluation(0) == []
