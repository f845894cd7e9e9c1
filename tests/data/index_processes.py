"""What other processes do to a sample index; this module imports little, so that they start fast."""

import os
import resource
import signal
import time
from pathlib import Path

from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.samples.index_cache import IndexCache
from megatron_bert_tp.data.samples.span_rule import SpanRule
from megatron_bert_tp.data.samples.spans import SPAN_COLUMNS

RULE = SpanRule(sequence_length=32, short_share=0.1, seed=7)
SPLIT = (80.0, 20.0, 0.0)


def open_spans(corpus, *, folder=None, wait=60.0, part="training", split=SPLIT, rule=RULE, say=None):
    """Spans, and what was said."""
    said = []
    cache = IndexCache(folder=folder, wait_seconds=wait, say=say or said.append)
    return cache.spans(corpus, part=part, split=split, rule=rule), said


def columns_of(spans):
    return {name: getattr(spans, name).tolist() for name in SPAN_COLUMNS}


def open_with_little_room(prefix, answers):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    corpus = Corpus.open(prefix)
    spans, said = open_spans(corpus)
    answers.put((columns_of(spans), spans.folder, said))


def open_together(prefix, barrier, waiters, answers):
    """The one that builds goes on when all others have said that they wait: ``waiters`` counts them."""
    said = []

    def say(line):
        said.append(line)
        if "is built by" in line:
            with waiters.get_lock():
                waiters.value += 1
        if "is built in" in line:
            # Not for ever: who waits gives up after 60 s, and the test sees what was not said.
            deadline = time.monotonic() + 40
            while waiters.value < barrier.parties - 1 and time.monotonic() < deadline:
                time.sleep(0.02)

    corpus = Corpus.open(prefix)
    barrier.wait(60)
    spans, _ = open_spans(corpus, say=say)
    answers.put((columns_of(spans), said))


def build_until(prefix, is_building, go_on):
    """Build, holding the lock until told; without ``go_on``, be killed instead."""

    def say(line):
        if "is built in" not in line:
            return
        is_building.set()
        if go_on is None:
            (building,) = Path(f"{prefix}.samples").glob("*.building-*")
            (building / "first.npy.part").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        go_on.wait(60)

    open_spans(Corpus.open(prefix), say=say)
