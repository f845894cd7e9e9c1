"""Stages on tensor ranks with the ways to save memory or time, and what a pass over microbatches leaves."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.initialisation import initial_tensor, initialise_
from megatron_bert_tp.model.recompute import Recompute
from megatron_bert_tp.model.shape import PRETRAINING, Head, ModelShape
from megatron_bert_tp.model.stage import MegatronBertStage, PretrainingLogits
from megatron_bert_tp.objectives.pretraining import Counts, microbatch_loss
from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.pipeline.partition import StagePlan, partition
from tests.comparison import Piece, piece_of
from tests.support import ODD_SHAPE, Layout, build_mesh, make_batch, with_dropout

COUNTS = Counts(masked=11, pairs=7)
# Three rows of 13: 39 positions, divided by neither 2 nor 4; one row of 8 tokens, 2 for each of 4.
LENGTHS = ((13, 9, 11), (8,), (16, 16))


@dataclass(frozen=True)
class Way:
    """How a stage is built and run; the numbers do not depend on it."""

    tensor: int = 1
    splits_sequence: bool = False
    recompute: Recompute = field(default_factory=Recompute)
    puts_off: bool = False


@dataclass(frozen=True)
class Model:
    """What decides the numbers."""

    shape: ModelShape = field(default_factory=lambda: with_dropout(SMALL))
    head: Head = PRETRAINING
    dtype: torch.dtype = torch.float64
    is_packed: bool = False


SMALL = replace(ODD_SHAPE, num_hidden_layers=3, vocab_size=103)


def packed(batch: Batch, lengths: tuple[int, ...], *, padding: int) -> Batch:
    """The samples of ``batch`` one behind another, by a loop over them."""
    width = batch.input_ids.shape[1]
    places = [(row, column) for row, length in enumerate(lengths) for column in range(length)]

    def row(values: Tensor) -> Tensor:
        return torch.tensor([[values[place].item() for place in places] + [0] * padding])

    place_of = {r * width + c: n for n, (r, c) in enumerate(places)}
    return replace(
        batch,
        input_ids=row(batch.input_ids),
        token_type_ids=row(batch.token_type_ids),
        attention_mask=None,
        masked_positions=torch.tensor([place_of[p] for p in batch.masked_positions.tolist()]),
        packed_lengths=lengths,
        position_ids=torch.tensor([[c for _, c in places] + [0] * padding]),
    )


def batches_of(model: Model, lengths: Sequence[tuple[int, ...]] = LENGTHS) -> list[Batch]:
    made = [
        make_batch(each, shape=model.shape, first_sample=10 * number, seed=4)
        for number, each in enumerate(lengths)
    ]
    if not model.is_packed:
        return made
    return [packed(batch, each, padding=2) for batch, each in zip(made, lengths, strict=True)]


def built(model: Model, way: Way, axis: Axis, plan: StagePlan | None = None) -> MegatronBertStage:
    """A stage of all layers, unless there is a ``plan``."""
    stage = MegatronBertStage(
        model.shape,
        plan or partition(model.shape.num_hidden_layers, 1)[0],
        axis=axis,
        head=model.head,
        seed=3,
        dtype=model.dtype,
        splits_sequence=way.splits_sequence,
        recompute=way.recompute,
    )
    initialise_(stage, seed=5)
    disturb_(stage)
    return stage.train()


def disturb_(stage: MegatronBertStage) -> None:
    """Biases that are not zero, and LayerNorms that are not one: else mistakes with them would not show."""
    for part in stage.parts():
        if len(part.shape) == 1:
            whole = initial_tensor(f"{part.source} disturbed", part.shape, seed=5, deviation=0.1)
            part.view(part.parameter.data).add_(part.cut(whole))


def loss_of(stage: MegatronBertStage, output: Tensor | PretrainingLogits, batch: Batch) -> Tensor:
    """The loss of pretraining; for other heads a sum with weights that are the same on every rank."""
    if isinstance(output, PretrainingLogits):
        return microbatch_loss(
            output, batch, COUNTS, num_classes=stage.shape.vocab_size, tensor=stage.axis
        )[0]
    if stage.head.has_predictions:
        num_classes = stage.shape.vocab_size
        losses, _ = vocab_parallel_cross_entropy(
            output, batch.masked_labels, num_classes=num_classes, axis=stage.axis
        )
        return losses.sum()
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return (output * weights).sum()


def kept_of(model: Model, way: Way, axis: Axis) -> list[int]:
    """Elements of every storage that autograd keeps for the backward of one microbatch of 3 rows of 13."""
    stage = built(model, way, axis)
    owned = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in owned:
            # Holding the tensor, so that no other takes its place in memory.
            kept[pointer] = tensor, tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    (batch,) = batches_of(model, LENGTHS[:1])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(stage, stage(None, batch), batch)
    del loss
    return [size for _, size in kept.values()]


def sum_over_sequence_(stage: MegatronBertStage) -> None:
    """Whole gradients from those of the own tokens."""
    done = set()
    for part in stage.parts():
        gradient = part.parameter.grad
        if stage.splits_sequence and part.over_sequence and gradient is not None and id(gradient) not in done:
            done.add(id(gradient))
            sum_over_(gradient, stage.axis)


def pieces_of(stage: MegatronBertStage) -> list[Piece]:
    """Gradients of this rank, the two of tied embeddings apart."""
    given = ((part, part.parameter.grad) for part in stage.parts())
    return [replace(piece_of(part, grad), name=part.name) for part, grad in given if grad is not None]


@dataclass(frozen=True)
class Result:
    """Loss of each microbatch, and the summed gradients of this rank."""

    losses: list[float]
    gradients: list[Piece]


def run(model: Model, way: Way, lengths: Sequence[tuple[int, ...]] = LENGTHS) -> Result:
    """Some microbatches on this rank; weight gradients that are put off come after the last of them."""
    stage = built(model, way, build_mesh(Layout(tensor=way.tensor)).tensor)
    losses = run_passes_(stage, batches_of(model, lengths), puts_off=way.puts_off)
    sum_over_sequence_(stage)
    return Result(losses, pieces_of(stage))


def run_passes_(stage: MegatronBertStage, batches: Sequence[Batch], *, puts_off: bool) -> list[float]:
    losses = []
    later = []
    for batch in batches:
        loss = loss_of(stage, stage(None, batch), batch)
        losses.append(loss.item())
        with ExitStack() as stack:
            works = stack.enter_context(stage.weight_gradients.put_off()) if puts_off else []
            loss.backward()
        later += works
    for work in later:
        work()
    return losses


def run_all(jobs: Mapping[str, tuple[Model, Way]]) -> dict[str, Result]:
    """Many runs in one call of the pool."""
    return {name: run(*job) for name, job in jobs.items()}
