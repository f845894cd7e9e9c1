"""Every message of a stage whose sequence is split, counted on real ranks and compared with the formulas.

Korthikanti et al. 2022, section 4.2.2: what an all-reduce of hidden states sends is sent as an all-gather and a
reduce-scatter, and one all-gather more in the backward of each column-parallel product.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch.distributed as dist

from megatron_bert_tp.model.recompute import Recompute
from tests.model.stages import SMALL, Model, Way, batches_of, built, loss_of
from tests.support import Layout, build_mesh

HIDDEN, LAYERS = SMALL.hidden_size, SMALL.num_hidden_layers
GATHERS = "all_gather", "all_gather_single", "all_gather_into_tensor"
SCATTERS = "reduce_scatter_single", "reduce_scatter_tensor"
OTHERS = "all_gather_object", "all_to_all", "barrier", "broadcast", "gather", "reduce", "reduce_scatter", "scatter"
LENGTHS = (13, 9, 11)


@contextmanager
def listening(calls: list[tuple[str, int]]) -> Iterator[None]:
    """Writes down the kind of each collective and the elements of the whole tensor."""
    names = [name for name in (*GATHERS, *SCATTERS, *OTHERS, "all_reduce") if hasattr(dist, name)]
    originals = {name: getattr(dist, name) for name in names}

    def recorded(name):
        def call(*args, **kwargs):
            calls.append(described(name, *args))
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, recorded(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def described(name: str, first: object, second: object = None, *_rest: object) -> tuple[str, int]:
    if name == "all_gather":
        return "gather", sum(part.numel() for part in first)
    if name in GATHERS:
        assert first.is_contiguous()
        return "gather", first.numel()
    if name in SCATTERS:
        return "scatter", second.numel()
    return ("reduce", first.numel()) if name == "all_reduce" else (name, -1)


def messages_of(model: Model, way: Way) -> dict[str, Counter]:
    """Messages of the forward, of the backward, and of the weight pass, of one microbatch."""
    stage = built(model, way, build_mesh(Layout(tensor=way.tensor)).tensor)
    (batch,) = batches_of(model, [LENGTHS])
    forward, backward, weights = [], [], []
    with listening(forward):
        loss = loss_of(stage, stage(None, batch), batch)
    with stage.weight_gradients.put_off() if way.puts_off else nullcontext([]) as works, listening(backward):
        loss.backward()
    with listening(weights):
        for work in works:
            work()
    assert bool(works) == way.puts_off
    return {"forward": Counter(forward), "backward": Counter(backward), "weights": Counter(weights)}


def expected(way: Way, *, is_packed: bool, num_masked: int) -> dict[str, Counter]:
    """Counts by the formulas; elements are those of all tokens, padding included."""
    num_tokens = sum(LENGTHS) + 2 if is_packed else len(LENGTHS) * max(LENGTHS)
    whole = -(-num_tokens // way.tensor) * way.tensor * HIDDEN
    column_inputs = {("gather", whole): 2 * LAYERS}
    forward = Counter({("gather", whole): 2 * LAYERS, ("scatter", whole): 2 * LAYERS + 1})
    backward = Counter({("gather", whole): 2 * LAYERS + 1, ("scatter", whole): 2 * LAYERS})
    # Rows of the heads; the cross entropy; the input of the vocabulary projection.
    forward[("reduce", (num_masked + len(LENGTHS)) * HIDDEN)] += 1
    forward[("reduce", num_masked)] += 1
    forward[("reduce", 2 * num_masked)] += 1
    backward[("reduce", num_masked * HIDDEN)] += 1
    weights = Counter()
    (weights if way.puts_off else backward).update(column_inputs)
    if way.recompute.kind == "full":
        backward.update({("gather", whole): 2 * LAYERS, ("scatter", whole): 2 * LAYERS})
    return {"forward": forward, "backward": backward, "weights": weights}


WAYS = {
    "tensor 2": Way(tensor=2, splits_sequence=True),
    "tensor 4": Way(tensor=4, splits_sequence=True),
    "put off": Way(tensor=2, splits_sequence=True, puts_off=True),
    "selective": Way(tensor=2, splits_sequence=True, recompute=Recompute("selective")),
    "full": Way(tensor=2, splits_sequence=True, recompute=Recompute("full")),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_a_microbatch_sends_what_the_formulas_say_and_nothing_else(ranks, name, is_packed):
    model, way = Model(is_packed=is_packed), WAYS[name]
    (batch,) = batches_of(model, [LENGTHS])
    formulas = expected(way, is_packed=is_packed, num_masked=len(batch.masked_positions))
    for found in ranks.run(way.tensor, messages_of, model, way):
        assert found == formulas


def test_a_layer_costs_six_gathers_and_four_scatters(ranks):
    """By the table itself: 2 + 2 forward, 4 + 2 backward."""
    totals = Counter()
    for found in ranks.run(2, messages_of, Model(), WAYS["tensor 2"])[0].values():
        for (kind, _), times in found.items():
            totals[kind] += times
    # The embeddings cost one of each.
    assert totals["gather"] == 6 * LAYERS + 1
    assert totals["scatter"] == 4 * LAYERS + 1
