import time
import tracemalloc

import numpy as np

from megatron_bert_tp.data.samples.sampler import SampleOrder


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


def test_any_batch_of_numbers_gives_what_one_number_gives_alone():
    """Data sizes, microbatches and workers only cut the numbers differently, over the end of an epoch too."""
    order = SampleOrder(37, seed=5)
    alone = [order.sample_at(number)[1] for number in range(200)]
    for size in (1, 3, 8, 64):
        batches = [order.spans(np.arange(first, min(first + size, 200))) for first in range(0, 200, size)]
        assert np.concatenate(batches).tolist() == alone


def test_corpora_of_a_blend_have_orders_of_their_own():
    orders = [SampleOrder(1000, seed=5, corpus=corpus).spans(np.arange(1000)) for corpus in (0, 1)]
    assert np.sum(orders[0] == orders[1]) < 10
    assert orders[0].tolist() == SampleOrder(1000, seed=5).spans(np.arange(1000)).tolist()


def test_a_hundred_million_spans_take_no_memory_and_a_batch_no_time():
    order = SampleOrder(10**8, seed=1)
    tracemalloc.start()
    started = time.process_time()
    order.spans(np.arange(10**8 - 512, 10**8 + 512))
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert seconds < 0.1
