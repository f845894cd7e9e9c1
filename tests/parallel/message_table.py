"""The messages of a training step by reasons: what a rank sends, derived from the layout and the microbatches."""

from collections import Counter
from collections.abc import Iterator

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.shape import tensor_shapes
from megatron_bert_tp.pipeline.partition import StagePlan
from tests.parallel.places import BY_OUTPUTS, PROJECTION, Bucket, Place, buckets, home, own_names
from tests.parallel.recording import Call

# Two losses, two numbers of hits, tokens and positions.
NUM_STATISTICS = 6
# Their gradients can be put off to passes of their own.
PUT_OFF = (*BY_OUTPUTS, ".output.dense.", PROJECTION, "cls.predictions.bias")


# The tensor axis


def of_layers(place: Place, plan: StagePlan, whole: int) -> Iterator[tuple[Call, int]]:
    """Calls of the layers of one stage for one microbatch, and how often."""
    num_layers, layout = len(plan.layers), place.layout
    again = [n for n in plan.layers if n % layout.every == 0] if layout.recompute == "full" else []
    if not place.splits:
        # Shoeybi et al. 2019: the row-parallel products of attention and MLP, and the inputs of their
        # column-parallel products; what is recomputed multiplies once more.
        yield Call("sum", "tensor", "forward", whole, place.working), 2 * num_layers
        yield Call("sum", "tensor", "backward", whole, place.working), 2 * num_layers + 2 * len(again)
        return
    # Korthikanti et al. 2022: gathered before column-parallel products, scattered after row-parallel ones, and
    # the other way round backward; the gathered inputs are not kept, and so gathered once more for the weights.
    gather, scatter = "gather", "scatter"
    yield Call(gather, "tensor", "forward", whole, place.working), 2 * num_layers
    yield Call(scatter, "tensor", "forward", whole, place.working), 2 * num_layers
    yield Call(gather, "tensor", "backward", whole, place.working), 2 * num_layers + 2 * len(again)
    yield Call(scatter, "tensor", "backward", whole, place.working), 2 * num_layers + 2 * len(again)
    inputs = "weights" if place.puts_off else "backward"
    yield Call(gather, "tensor", inputs, whole, place.working), 2 * num_layers


def of_ends(place: Place, plan: StagePlan, batch: Batch, whole: int) -> Iterator[tuple[Call, int]]:
    """Calls of the lookup and of the heads for one microbatch."""
    if plan.is_first:
        # Every rank looks up its own rows of the vocabulary.
        yield Call("scatter" if place.splits else "sum", "tensor", "forward", whole, place.working), 1
        if place.splits:
            yield Call("gather", "tensor", "backward", whole, place.working), 1
    if plan.is_last:
        masked, hidden = len(batch.masked_positions), place.shape.hidden_size
        samples = len(batch.sample_numbers)
        if place.splits:
            # Rows that the heads read, whoever has them: masked positions, and the first of each sample.
            yield Call("sum", "tensor", "forward", (masked + samples) * hidden, place.working), 1
        # Cross entropy: largest logit, then sum of exponentials and the label's logit together.
        yield Call("maximum", "tensor", "forward", masked, place.exact), 1
        yield Call("sum", "tensor", "forward", 2 * masked, place.exact), 1
        # Input of the vocabulary projection, at the masked positions only.
        yield Call("sum", "tensor", "backward", masked * hidden, place.working), 1


def on_tensor_axis(place: Place) -> Iterator[tuple[Call, int]]:
    for batch in place.batches:
        whole = place.run(batch) * (place.layout.tensor if place.splits else 1)
        for plan in place.plans:
            yield from of_layers(place, plan, whole)
            yield from of_ends(place, plan, batch, whole)
    # Squares of all tensors, for the norm.
    yield Call("sum", "tensor", "gradients", len(tensor_shapes(place.shape)), "float64"), 1
    for bucket in buckets(place):
        if bucket.kind == "late":
            # Each tensor rank has the gradients of its own tokens.
            yield Call("sum", "tensor", "gradients", bucket.elements, place.exact), 1
    yield from of_lamb(place, "tensor")


# The data axis


def departure(bucket: Bucket, place: Place) -> str:
    """When a bucket sets out: in the last pass that adds to it, or after all of them."""
    if bucket.kind != "early":
        return "gradients"
    waits = any(part in name for part in PUT_OFF for name in bucket.names)
    return "weights" if place.puts_off and waits else "backward"


def on_data_axis(place: Place) -> Iterator[tuple[Call, int]]:
    # Numbers of masked tokens and of pairs in the whole step.
    yield Call("sum", "data", "count", 2, "int64"), 1
    for bucket in buckets(place):
        # ZeRO-1 (Rajbhandari et al. 2020): an owner gets the sums of its rows, and gives back what it has moved.
        kind = "scatter" if place.layout.shards else "sum"
        yield Call(kind, "data", departure(bucket, place), bucket.elements, place.exact), 1
        yield Call("gather", "data", "update", bucket.elements, place.working), int(place.layout.shards)
    # Squares of the rows of each owner, for the norm.
    num_tensors = len(tensor_shapes(place.shape))
    yield Call("sum", "data", "gradients", num_tensors, "float64"), int(place.layout.shards)
    yield Call("sum", "data", "report", NUM_STATISTICS, "float64"), 1
    if place.layout.shards:
        yield from of_lamb(place, "data")


def of_lamb(place: Place, axis: str) -> Iterator[tuple[Call, int]]:
    """Norms of weight and update of each tensor that decays, over those who hold pieces of it."""
    if place.config.optimizer.name == "lamb":
        decays = [n for n in own_names(place) if not n.endswith((".bias", ".ln.weight", ".LayerNorm.weight"))]
        yield Call("sum", axis, "update", 2 * len(decays), "float64"), 1


# The pipeline


def on_pipeline_axis(place: Place) -> Iterator[tuple[Call, int]]:
    for stage in range(place.layout.pipeline * place.layout.virtual - 1):
        # Hidden states onward, gradients back.
        yield from of_boundary(place, "hidden states", home(stage, place.layout), home(stage + 1, place.layout))
        yield from of_boundary(place, "gradient", home(stage + 1, place.layout), home(stage, place.layout))
    yield Call("sum", "pipeline", "gradients", len(tensor_shapes(place.shape)), "float64"), 1
    # One rank alone knows the losses.
    yield Call("sum", "pipeline", "report", NUM_STATISTICS, "float64"), 1


def of_boundary(place: Place, phase: str, source: int, target: int) -> Iterator[tuple[Call, int]]:
    """Messages of all microbatches from one stage to another; within a rank there is none."""
    own, replica, shard = place.sizes.place_of(place.rank)
    axis = "channel"  # two ranks have one for each direction
    for batch in place.batches if source != target else ():
        size = place.run(batch)
        if own == source:
            yield Call("isend", axis, phase, size, place.working, place.sizes.rank_at(target, replica, shard)), 1
        if own == target:
            yield Call("irecv", axis, phase, size, place.working, place.sizes.rank_at(source, replica, shard)), 1


def on_tied_axis(place: Place) -> Iterator[tuple[Call, int]]:
    ends = {home(0, place.layout), home(place.layout.pipeline * place.layout.virtual - 1, place.layout)}
    for bucket in buckets(place):
        # The gradients of both uses of the word embeddings, unless one rank has both.
        if bucket.kind == "tied" and len(ends) > 1:
            yield Call("sum", "tied", "gradients", bucket.elements, place.exact), 1


def table(place: Place) -> Counter[Call]:
    """All messages of a step; an axis of one rank sends none."""
    layout = place.layout
    rows = {
        on_tensor_axis: layout.tensor,
        on_pipeline_axis: layout.pipeline,
        on_tied_axis: layout.pipeline,
        on_data_axis: layout.data,
    }
    expected: Counter[Call] = Counter()
    for calls, size in rows.items():
        for call, times in calls(place) if size > 1 else ():
            expected[call] += times
    return +expected
