"""The cut of the layers into pipeline stages, weighing the embeddings and the head."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_bert_tp.errors import LayoutError


@dataclass(frozen=True)
class StagePlan:
    """What one (virtual) stage holds: its layers by global number, embeddings if first, head if last."""

    is_first: bool
    is_last: bool
    layers: range


@dataclass(frozen=True)
class StageCosts:
    """What the ends of the pipeline cost beside their layers, in units of one layer."""

    embedding: float
    head: float


def partition(
    num_layers: int, num_stages: int, *, embedding_cost: float = 0.0, head_cost: float = 0.0
) -> tuple[StagePlan, ...]:
    """Plans of all stages, cut so that the most expensive stage is as cheap as can be.

    Costs are in units of one layer: ``embedding_cost`` weighs on the first stage, ``head_cost`` on the last.
    Every stage gets at least one layer.  Of the cuts with the same most expensive stage it takes the
    most even one (then the second most expensive is as cheap as can be, and so on), and of those the one
    with more layers on the earlier stages; without costs, the first stages take the remainder.
    Raises LayoutError when there are fewer layers than stages.
    """
    if not 1 <= num_stages <= num_layers:
        raise LayoutError(
            f"the stages, parallel.pipeline x parallel.virtual ({num_stages}), must be from 1 to "
            f"model.num_hidden_layers ({num_layers}), since every stage holds at least one layer; use at most "
            f"{num_layers} stages or a deeper model"
        )
    ends = [0.0] * num_stages
    ends[0] += embedding_cost
    ends[-1] += head_cost
    starts = accumulate(_fill(num_layers, ends), initial=0)
    return tuple(
        StagePlan(is_first=begin == 0, is_last=end == num_layers, layers=range(begin, end))
        for begin, end in pairwise(starts)
    )


def _fill(num_layers: int, ends: Sequence[float]) -> list[int]:
    """Layers per stage: one each, then each further layer goes where it leaves the cheapest stage.

    Layers cost the same, so no later choice can make up for a dearer one: greedy is exact.
    """
    counts = [1] * len(ends)
    for _ in range(num_layers - len(ends)):
        cheapest = min(range(len(ends)), key=lambda stage: counts[stage] + ends[stage])
        counts[cheapest] += 1
    return counts


def stage_costs(
    *, hidden_size: int, intermediate_size: int, vocab_size: int, sequence_length: int, predicted_share: float
) -> StageCosts:
    """Costs of embeddings and MLM head, in layers, by the matrix products of one sequence.

    With ``s`` positions, ``h`` features, ``i`` inside the MLP and ``V`` words, a layer takes
    ``8 s h^2 + 4 s h i + 4 s^2 h`` FLOPs (``24 s h^2 + 4 s^2 h`` at ``i = 4 h``) and the head
    ``2 h^2 + 2 h V`` at each predicted position, ``predicted_share`` of all (from 0 to 1; 1 for a head
    at every position).  A lookup multiplies nothing: embeddings cost 0.
    Tensor parallelism divides all of it alike, and so does not change the ratio.
    """
    layer = sequence_length * hidden_size * (8 * hidden_size + 4 * intermediate_size + 4 * sequence_length)
    head = predicted_share * sequence_length * 2 * hidden_size * (hidden_size + vocab_size)
    return StageCosts(embedding=0.0, head=head / layer)
