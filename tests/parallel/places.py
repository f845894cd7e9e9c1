"""Where each rank of a layout stands, what it computes and holds; nothing here reads the code that sends.

Only the order of parameters in buckets is that of the stages themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path

from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.model.shape import ModelShape, tensor_shapes
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.mesh import Axis, MeshShape
from megatron_bert_tp.pipeline.partition import StagePlan
from megatron_bert_tp.training.recipe import model_shape, stage_plans
from megatron_bert_tp.training.texts import open_texts
from tests.support import Layout, Recipe
from tests.trainers import configure

WORDS = "bert.embeddings.word_embeddings.weight"
PROJECTION = "cls.predictions.decoder.weight"
BY_VOCABULARY = (WORDS, PROJECTION, "cls.predictions.bias")
BY_OUTPUTS = (".query.", ".key.", ".value.", ".intermediate.dense.")
BY_INPUTS = (".output.dense.weight",)
# Applied to hidden states whose tokens sequence parallelism shares out.
OVER_TOKENS = (
    ".ln.weight", ".ln.bias", ".output.dense.bias", "position_embeddings.weight", "type_embeddings.weight",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """One rank, and the microbatches of its replica in the second step."""

    config: Config
    layout: Layout
    rank: int
    batches: list[Batch]

    @cached_property
    def shape(self) -> ModelShape:
        return model_shape(self.config)

    @property
    def sizes(self) -> MeshShape:
        return MeshShape(pipeline=self.layout.pipeline, data=self.layout.data, tensor=self.layout.tensor)

    @property
    def stages(self) -> list[int]:
        """Numbers of the virtual stages of this rank."""
        numbers = range(self.layout.pipeline * self.layout.virtual)
        return [stage for stage in numbers if home(stage, self.layout) == self.sizes.place_of(self.rank)[0]]

    @cached_property
    def plans(self) -> list[StagePlan]:
        plans = stage_plans(self.config)
        return [plans[stage] for stage in self.stages]

    @property
    def working(self) -> str:
        """Number format of hidden states and parameters."""
        return self.config.optimizer.precision

    @property
    def exact(self) -> str:
        """Number format of gradients that are added up, and of the cross entropy."""
        return "float32" if self.working == "bfloat16" else self.working

    @property
    def puts_off(self) -> bool:
        return self.layout.schedule.startswith("zb")

    @property
    def splits(self) -> bool:
        return self.layout.sequence and self.layout.tensor > 1

    @property
    def owners(self) -> int:
        return self.layout.data if self.layout.shards else 1

    def run(self, batch: Batch) -> int:
        """Elements of hidden states that one rank has: all, or its run of tokens, rounded up."""
        num_tokens = batch.input_ids.numel()
        length = ceil(num_tokens / self.layout.tensor) if self.splits else num_tokens
        return length * self.shape.hidden_size


def home(stage: int, layout: Layout) -> int:
    """The rank of the pipeline that holds a virtual stage: round and round, or down and up again."""
    if layout.schedule == "zb-v" and stage >= layout.pipeline:
        return 2 * layout.pipeline - 1 - stage
    return stage % layout.pipeline


def places(settings: Path, recipe: Recipe, layout: Layout, *overrides: str) -> Iterator[Place]:
    """All ranks, each with what its replica computes in the second step."""
    config = configure(settings, recipe, layout, *overrides)
    sizes = MeshShape(pipeline=layout.pipeline, data=layout.data, tensor=layout.tensor)
    batches = []
    for replica in range(layout.data):
        texts = open_texts(config, Axis("data", tuple(range(layout.data)), replica), say=print)
        batches.append(texts.training.take(config.optimizer.global_batch))
    for rank in range(layout.world):
        yield Place(config, layout, rank, batches[sizes.place_of(rank)[1]])


# What it holds


@dataclass(frozen=True)
class Bucket:
    """``kind`` says what a bucket waits for: its own backwards, or the tied copies, or the tensor ranks."""

    kind: str
    names: tuple[str, ...]
    elements: int


def held(name: str, place: Place) -> tuple[int, ...]:
    """What the fullest tensor rank holds of a tensor, vocabulary padding left out."""
    rows, *others = tensor_shapes(place.shape)[WORDS if name == PROJECTION else name]
    size = place.layout.tensor
    if size == 1:
        return rows, *others
    if name in BY_VOCABULARY:
        # Shares are rounded up to multiples of 8.
        return min(rows, 8 * ceil(rows / size / 8)), *others
    if any(part in name for part in BY_OUTPUTS):
        return rows // size, *others
    if name.endswith(BY_INPUTS):
        return rows, others[0] // size
    return rows, *others


def in_bucket(name: str, place: Place) -> int:
    """Elements of a tensor in its bucket: every owner gets equally many rows."""
    rows, *others = held(name, place)
    return place.owners * ceil(rows / place.owners) * prod(others)


def own_names(place: Place) -> list[str]:
    """Tensors of this rank in the order of its stages and their parameters, a tied copy only where it is alone."""
    axis = Axis("tensor", tuple(range(place.layout.tensor)), 0)
    stages = [MegatronBertStage(place.shape, plan, axis=axis) for plan in place.plans]
    names = [part.name for part in Chunks(stages).trained_parts()]
    return [name for name in names if name != PROJECTION or WORDS not in names]


def kind_of(name: str, place: Place) -> str:
    if name in (WORDS, PROJECTION):
        return "tied"
    return "late" if place.splits and name.startswith("bert.") and name.endswith(OVER_TOKENS) else "early"


def buckets(place: Place) -> list[Bucket]:
    """Early ones of at least the set size, the last layers first; then one for the tied weight, and one late."""
    names: dict[str, list[str]] = {"early": [], "tied": [], "late": []}
    for name in own_names(place):
        names[kind_of(name, place)].append(name)
    least = (place.config.parallel.bucket_megabytes << 20) // {"float32": 4, "float64": 8}[place.exact]
    runs: list[list[str]] = [[]]
    for name in reversed(names["early"]):
        if sum(prod(held(each, place)) for each in runs[-1]) >= least:
            runs.append([])
        runs[-1].append(name)
    kinds = [*(("early", run) for run in runs), ("tied", names["tied"]), ("late", names["late"])]
    sized = [Bucket(kind, tuple(run), sum(in_bucket(name, place) for name in run)) for kind, run in kinds]
    return [bucket for bucket in sized if bucket.names]
