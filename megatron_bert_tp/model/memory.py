"""Bytes that one rank saves for the backward of a microbatch, from sizes alone.

Every term is derived in docs/memory.md from what each function of the forward saves.  A storage counts once
however many tensors look at it, and parameters do not count: `model.static_memory` has those.  The numbers are
those of pretraining on CPU, where each function keeps its masks.  Nothing here imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.model.microbatch_sizes import Group, Microbatch
from megatron_bert_tp.model.recompute import Kind, Recompute
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.pipeline.instructions import Order, Phase
from megatron_bert_tp.pipeline.partition import StagePlan

_INDEX, _FLOAT32, _DROPOUT_STEPS = 8, 4, 65536


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is trained, as far as activations depend on it; ``element_bytes`` is 8, 4 or 2."""

    shape: ModelShape
    element_bytes: int = 4
    tensor: int = 1
    splits_sequence: bool = False
    recompute: Recompute = field(default_factory=Recompute)

    def __post_init__(self) -> None:
        if self.shape.is_relative or self.shape.add_cross_attention:
            raise ConfigError(
                "there is no formula for the activations of relative positions or cross-attention; use "
                "model.position_embedding_type=absolute, or measure a step"
            )

    @property
    def wide_bytes(self) -> int:
        """Bytes of a number where 16 bits are too few."""
        return max(_FLOAT32, self.element_bytes)

    @property
    def is_split(self) -> bool:
        """Whether each tensor rank has its own tokens alone between the products."""
        return self.splits_sequence and self.tensor > 1

    @property
    def drops_hidden(self) -> bool:
        """Whether there is dropout on hidden states."""
        return _drops(self.shape.hidden_dropout_prob)

    @property
    def drops_attention(self) -> bool:
        """Whether there is dropout on attention probabilities."""
        return _drops(self.shape.attention_probs_dropout_prob)

    def own(self, batch: Microbatch) -> int:
        """Positions of which this rank has the hidden states."""
        return -(-batch.positions // self.tensor) if self.is_split else batch.positions

    def whole(self, batch: Microbatch) -> int:
        """Positions in the products: all of them, and what makes the ranks' runs even."""
        return self.own(batch) * self.tensor if self.is_split else batch.positions

    @property
    def vocabulary(self) -> int:
        """Rows of the vocabulary on this rank, padding included."""
        return padded_share(self.shape.vocab_size, self.tensor)


Terms = Mapping[str, int]
"""Bytes by what they hold, under the names of the tables in docs/memory.md."""


def layer_terms(layout: Layout, batch: Microbatch, kind: Kind = "none") -> Terms:
    """What one layer saves when it recomputes ``kind``."""
    element, hidden = layout.element_bytes, layout.shape.hidden_size
    states = layout.own(batch) * hidden * element
    if kind == "full":
        return {"input": states}
    joined = layout.whole(batch) * hidden // layout.tensor * element
    inside = layout.whole(batch) * layout.shape.intermediate_size // layout.tensor * element
    statistics = 2 * layout.own(batch) * layout.wide_bytes
    mask = layout.own(batch) * hidden * layout.drops_hidden
    attention = {"projected": 3 * joined} if kind == "selective" else _attention_terms(layout, batch)
    return {
        "input": states,
        "first LayerNorm": states + statistics,
        **attention,
        "joined heads": joined,
        "mask of attention output": mask,
        "input of MLP": states,
        "second LayerNorm": states + statistics,
        **_activation_terms(layout, inside),
        "mask of MLP output": mask,
    }


def layer_bytes(layout: Layout, batch: Microbatch, kind: Kind = "none") -> int:
    """Sum of `layer_terms`."""
    return sum(layer_terms(layout, batch, kind).values())


def stage_terms(layout: Layout, batch: Microbatch, plan: StagePlan) -> Terms:
    """What one (virtual) stage saves, the loss included on the last."""
    kinds = [layout.recompute.of_layer(number) for number in plan.layers]
    return {
        **(_embedding_terms(layout, batch) if plan.is_first else {}),
        "layers": sum(layer_bytes(layout, batch, kind) for kind in kinds),
        **(_shared_terms(layout, batch) if "none" in kinds else {}),
        **(_head_terms(layout, batch) if plan.is_last else {}),
    }


def stage_bytes(layout: Layout, batch: Microbatch, plan: StagePlan) -> int:
    """Sum of `stage_terms`: bytes saved for the backward of one microbatch."""
    return sum(stage_terms(layout, batch, plan).values())


def deferred_terms(layout: Layout, batch: Microbatch, plan: StagePlan) -> Terms:
    """What waits between an input gradient and its weight gradient: both sides of each sharded product."""
    element, size = layout.element_bytes, layout.tensor
    hidden, inside = layout.shape.hidden_size, layout.shape.intermediate_size // size
    own, whole = layout.own(batch) * hidden, layout.whole(batch) * hidden
    # A product that scatters its output keeps that side's gradient of all tokens and, for the bias, of its own.
    rows = whole + own if layout.is_split else whole
    layer = {
        "query, key, value": own + 3 * whole // size,
        "attention output": whole // size + rows,
        "into MLP": own + layout.whole(batch) * inside,
        "out of MLP": layout.whole(batch) * inside + rows,
    }
    terms = {name: len(plan.layers) * count * element for name, count in layer.items()}
    if plan.is_last:
        terms["projection"] = batch.masked * (hidden + layout.vocabulary) * element
    return terms


def deferred_bytes(layout: Layout, batch: Microbatch, plan: StagePlan) -> int:
    """Sum of `deferred_terms`, of one microbatch."""
    return sum(deferred_terms(layout, batch, plan).values())


def peak_bytes(order: Order, *, saved: Sequence[int], deferred: Sequence[int]) -> int:
    """Most that a rank holds after any pass of ``order``; both give the bytes of each of its chunks."""
    held = peak = 0
    for compute in order:
        forward, later = _CHANGES[compute.phase]
        held += forward * saved[compute.chunk] + later * deferred[compute.chunk]
        peak = max(peak, held)
    return peak


_CHANGES = {
    Phase.FORWARD: (1, 0),
    Phase.BACKWARD: (-1, 0),
    Phase.INPUT_GRADIENT: (-1, 1),
    Phase.WEIGHT_GRADIENT: (0, -1),
}


def _drops(probability: float) -> bool:
    """Whether a probability is more than nothing in steps of dropout."""
    return round(probability * _DROPOUT_STEPS) > 0


def padded_share(rows: int, size: int) -> int:
    """Rows of the vocabulary on each of ``size`` tensor ranks, as `parallel.sharding.padded_share` has them."""
    share = -(-rows // size)
    return rows if size == 1 else -(-share // 8) * 8


def _attention_terms(layout: Layout, batch: Microbatch) -> Terms:
    """From queries, keys and values to the heads before they are joined."""
    element, heads = layout.element_bytes, layout.shape.num_attention_heads // layout.tensor
    features = batch.slots * layout.shape.hidden_size // layout.tensor * element
    # Of a single head they are a view of the joined ones, unless these are put into another order or padded.
    is_view = heads == 1 and not batch.is_packed and layout.whole(batch) == batch.positions
    packed = {"queries, keys, values": 3 * features, "heads": 0 if is_view else features}
    if not layout.drops_attention:
        return {**packed, "logarithms of sums": batch.slots * heads * layout.wide_bytes}
    pairs = batch.squares * heads
    return {**packed, "probabilities": pairs * element, "mask of probabilities": pairs}


def _activation_terms(layout: Layout, inside: int) -> Terms:
    """An activation's output is the next product's input; the ReLU needs no more than its output itself."""
    before = {} if layout.shape.hidden_act == "relu" else {"before activation": inside}
    return {**before, "after activation": inside}


def _shared_terms(layout: Layout, batch: Microbatch) -> Terms:
    """What all layers that recompute nothing share: masks for torch's attention, the maps of a packed row."""
    terms = {}
    if not layout.drops_attention:
        terms["attention masks"] = layout.element_bytes * sum(
            _mask_elements(group, is_causal=layout.shape.is_decoder) for group in batch.groups
        )
    if batch.is_packed:
        padding = batch.positions - batch.tokens + batch.slots - batch.tokens
        terms["maps of slots"] = _INDEX * (batch.positions + batch.slots + padding)
    return terms


def _mask_elements(group: Group, *, is_causal: bool) -> int:
    if not (group.is_padded or is_causal):
        return 0
    rows = group.rows if group.is_padded else 1
    return rows * group.length * (group.length if is_causal else 1)


def _embedding_terms(layout: Layout, batch: Microbatch) -> Terms:
    """Indices, those that are the batch's own too; token types of a split sequence are a view of all."""
    positions = layout.whole(batch)
    has_positions = layout.is_split or batch.is_packed
    return {
        "word ids": _INDEX * positions,
        # Ids of other ranks' words are looked up in row 0, and what that gives is put out.
        "words elsewhere": positions * (layout.tensor > 1),
        "token types": _INDEX * positions,
        "position ids": _INDEX * positions * has_positions,
        "mask of embeddings": layout.own(batch) * layout.shape.hidden_size * layout.drops_hidden,
    }


def _head_terms(layout: Layout, batch: Microbatch) -> Terms:
    """Final LayerNorm, the rows that heads read, both heads and the loss."""
    states = layout.shape.hidden_size * layout.element_bytes
    rows = batch.masked * states
    steps = 2 if layout.shape.hidden_act == "relu" else 3
    return {
        "final LayerNorm": layout.own(batch) * (states + 2 * layout.wide_bytes),
        **_chosen_terms(layout, batch),
        "transform": steps * rows + 2 * batch.masked * layout.wide_bytes,
        "softmax": batch.masked * layout.vocabulary * layout.wide_bytes,
        "labels": batch.masked * (_INDEX + 2),
        "pooled": batch.samples * states,
        "next sentence": batch.samples * (2 * layout.wide_bytes + _INDEX) + layout.wide_bytes,
    }


def _chosen_terms(layout: Layout, batch: Microbatch) -> Terms:
    """The states of masked places and of first tokens; the latter by their place where rows hold several."""
    chosen = batch.masked + batch.samples
    states = chosen * layout.shape.hidden_size * layout.element_bytes
    if layout.is_split:
        return {"chosen states": states, "chosen places": chosen * (_INDEX + 1)}
    places = chosen if batch.is_packed else batch.masked
    return {"chosen states": states, "chosen places": places * _INDEX}
