"""All ranks make communicators and call them in one order: recorded over start and two steps on gloo.

NCCL matches calls by their order alone.  gloo may forgive what would hang there, so the order itself is checked.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.training.build import build_pretrainer
from megatron_bert_tp.training.passes import Passes
from megatron_bert_tp.training.processes import build_mesh
from megatron_bert_tp.training.texts import open_texts
from tests.parallel.recording import RECIPE, Call, Case, Event, Recorder
from tests.support import CPU, TIMEOUT, Layout
from tests.trainers import CORPUS_SHAPE, configure

SENDS, RECEIVES = ("send", "isend"), ("recv", "irecv")
WIDE = replace(RECIPE, shape=replace(CORPUS_SHAPE, hidden_size=64, intermediate_size=256))
NARROW = replace(RECIPE, dtype=torch.bfloat16)
CASES = {
    "all axes": Case(Layout(data=2, pipeline=2, tensor=2)),
    "buckets": Case(Layout(data=2, tensor=2, sequence=True, shards=True), WIDE),
    # Both ranks send hidden states and gradients to each other.
    "interleaved": Case(Layout(data=2, pipeline=2, schedule="interleaved", virtual=2, overlaps=True)),
    "zb-h1": Case(Layout(pipeline=4, schedule="zb-h1", overlaps=True)),
    "everything": Case(
        Layout(data=2, pipeline=2, tensor=2, schedule="zb-v", virtual=2, sequence=True, shards=True,
               overlaps=True, recompute="full", every=2, packing="packed"),
        NARROW,
        ("optimizer.name=lamb",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Heard:
    """All of one rank: the ranks of each communicator in the order of making, and what it said."""

    groups: list[tuple[int, ...]]
    events: list[Event]


def listen(settings: Path, case: Case) -> Heard:
    """Start and two steps; the axis of a call is the number of its communicator, or ``world``."""
    groups: list[tuple[int, ...]] = []
    names: dict[int, str] = {}
    make = dist.new_group

    def numbered(ranks: list[int], **options: Any) -> Any:
        group = make(ranks, **options)
        names[id(group)] = str(len(groups))
        groups.append(tuple(ranks))
        return group

    agreement = Agreement.of_world(TIMEOUT)
    names[id(agreement._group)] = "world"
    recorder = Recorder(names)
    with patch.object(dist, "new_group", numbered), recorder.listening():
        config = configure(settings, case.recipe, case.layout, *case.overrides)
        mesh = build_mesh(
            LaunchEnvironment(rank=dist.get_rank(), world_size=dist.get_world_size()),
            CPU,
            tensor=case.layout.tensor,
            pipeline=case.layout.pipeline,
            ends=Passes(config.parallel).placement.ends,
            timeout=TIMEOUT,
        )
        texts = open_texts(config, mesh.data, say=print)
        trainer = build_pretrainer(config, mesh, texts, agreement=agreement, device=CPU)
        for _ in range(2):
            trainer.train_step()
    return Heard(groups, recorder.events)


@pytest.fixture(scope="module", params=CASES)
def heard(request, ranks, data) -> list[Heard]:
    case = CASES[request.param]
    return ranks.run(case.layout.world, listen, data, case)


def test_all_ranks_make_the_same_communicators_in_the_same_order(heard):
    first = heard[0].groups
    assert all(rank.groups == first for rank in heard)
    assert first
    assert all(len(ranks) > 1 and list(ranks) == sorted(ranks) for ranks in first)


def members(heard: list[Heard], group: str) -> tuple[int, ...]:
    return tuple(range(len(heard))) if group == "world" else heard[0].groups[int(group)]


def collectives(rank: Heard) -> Iterator[tuple[str, tuple[str, int, str]]]:
    """Communicator, and what all its ranks must say alike."""
    for event in rank.events:
        if event.call.kind not in SENDS + RECEIVES:
            yield event.call.axis, (event.call.kind, event.call.elements, event.call.dtype)


def same_collectives(heard: list[Heard]) -> None:
    """All ranks of a communicator call the same collectives in the same order."""
    said: dict[str, dict[int, list[tuple[str, int, str]]]] = defaultdict(lambda: defaultdict(list))
    for rank, each in enumerate(heard):
        for group, collective in collectives(each):
            said[group][rank].append(collective)
    assert said.keys() <= {"world", *map(str, range(len(heard[0].groups)))}, "a communicator of somebody else"
    for group, of_ranks in said.items():
        assert tuple(sorted(of_ranks)) == members(heard, group)
        sequences = list(of_ranks.values())
        for sequence in sequences[1:]:
            assert sequence == sequences[0], f"communicator {group} of ranks {members(heard, group)}"


def one_order(heard: list[Heard]) -> None:
    """The collectives of all communicators have one order that every rank keeps to.

    Else two ranks could wait for each other, each in a communicator that the other comes to later.
    """
    order: TopologicalSorter[tuple[str, int]] = TopologicalSorter()
    for each in heard:
        counts: dict[str, int] = defaultdict(int)
        nodes = []
        for group, _ in collectives(each):
            nodes.append((group, counts[group]))
            counts[group] += 1
        for before, after in pairwise(nodes):
            order.add(after, before)
    order.prepare()  # raises CycleError


Channel = dict[tuple[str, int, int], list[tuple[int, str, Any]]]


def channels(heard: list[Heard]) -> tuple[Channel, Channel]:
    """What was sent and what was expected, by communicator, source and target."""
    sent: Channel = defaultdict(list)
    expected: Channel = defaultdict(list)
    for rank, each in enumerate(heard):
        for event in each.events:
            call, content = event.call, (event.call.elements, event.call.dtype, event.transfer)
            if call.kind in SENDS:
                sent[call.axis, rank, call.peer].append(content)
            elif call.kind in RECEIVES:
                expected[call.axis, call.peer, rank].append(content)
    return sent, expected


def paired(heard: list[Heard]) -> None:
    """Sends and receives of two ranks pair up in order: the same message of the schedule, size and format."""
    sent, expected = channels(heard)
    assert sent == expected


def one_way(heard: list[Heard]) -> None:
    """A communicator with messages has one source and one target.

    NCCL has one queue for all messages of a rank in a communicator: a receive holds up the sends behind it.
    """
    sent, _ = channels(heard)
    assert len({group for group, _, _ in sent}) == len(sent)
    both = {(source, target) for _, source, target in sent}
    assert all((target, source) in both for source, target in both), "every pair talks in both directions"


RULES = (same_collectives, one_order, paired, one_way)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_all_ranks_keep_one_order(heard, rule):
    rule(heard)


def forged(*of_ranks: tuple[Call, ...]) -> list[Heard]:
    """Two ranks with two communicators, ``0`` and ``1``."""
    return [Heard([(0, 1), (0, 1)], [Event(call, None) for call in calls]) for calls in of_ranks]


A, LONGER_A, B = (Call("sum", group, "", size, "float32") for group, size in (("0", 3), ("0", 5), ("1", 3)))
TO_1, FROM_0 = Call("isend", "0", "", 3, "float32", 1), Call("irecv", "0", "", 3, "float32", 0)
LONG_TO_1, LONG_FROM_0 = replace(TO_1, elements=5), replace(FROM_0, elements=5)
TO_0, FROM_1 = replace(TO_1, peer=0), replace(FROM_0, peer=1)


@pytest.mark.parametrize(
    ("rule", "heard", "error"),
    [
        (same_collectives, forged((A, LONGER_A), (LONGER_A, A)), AssertionError),
        (same_collectives, forged((A, B), (A,)), AssertionError),
        (same_collectives, forged((A,), (replace(A, dtype="float64"),)), AssertionError),
        (one_order, forged((A, B), (B, A)), CycleError),
        (paired, forged((TO_1, LONG_TO_1), (LONG_FROM_0, FROM_0)), AssertionError),
        (paired, forged((TO_1,), ()), AssertionError),
        (one_way, forged((TO_1, FROM_1), (FROM_0, TO_0)), AssertionError),
    ],
)
def test_a_broken_rule_is_told(rule, heard, error):
    with pytest.raises(error):
        rule(heard)
