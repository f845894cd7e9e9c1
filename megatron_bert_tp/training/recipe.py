"""What a run is made of, whether it pretrains or learns a task: the rest of `training` sees no other settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_bert_tp.config.task_schema import TaskRun
from megatron_bert_tp.model.shape import PRETRAINING, Head, ModelShape
from megatron_bert_tp.pipeline.partition import StagePlan, partition, stage_costs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a run after its data and its weights are known.

    ``given`` are the settings as the user gave them, which are written down and compared when a run goes on;
    ``fingerprints`` tell what is read from other data; ``facts`` go into checkpoints.
    """

    given: Config | TaskRun
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    run: RunConfig
    shape: ModelShape
    head: Head
    plans: tuple[StagePlan, ...]
    tokenizer_files: Mapping[str, Path]
    """Files of the tokenizer by the name under which they go along with the run and its checkpoints."""
    lowercase: bool | None
    fingerprints: tuple[str, ...]
    start: str | None = None
    """Fingerprint of ``weights``, where other ones are another experiment."""
    weights: Path | None = None
    """What step 0 begins with; None: weights drawn from the seed."""
    facts: Mapping[str, JSON] = field(default_factory=dict)
    takes_head: bool = True
    """Whether the head of ``weights`` is for the same labels; else it is drawn from the seed."""
    layer_decay: float = 1.0
    frozen_layers: int | None = None

    @property
    def directory(self) -> Path:
        """Folder of the run."""
        return Path(self.run.directory)

    @property
    def warmup_setting(self) -> str:
        """The setting by which whoever started this run says how long the rate warms up."""
        if isinstance(self.given, TaskRun):
            return "optimizer.warmup_share"
        return f"optimizer.warmup_{self.optimizer.schedule_unit}"


def pretraining_recipe(config: Config, fingerprints: tuple[str, ...] = ()) -> Recipe:
    """Recipe of a pretraining run, over corpora with these fingerprints."""
    return Recipe(
        given=config,
        optimizer=config.optimizer,
        parallel=config.parallel,
        run=config.run,
        shape=model_shape(config),
        head=PRETRAINING,
        plans=stage_plans(config),
        tokenizer_files={tokenizer_name(config): Path(config.data.tokenizer)},
        lowercase=config.data.lowercase,
        fingerprints=fingerprints,
        weights=None if config.model.weights is None else Path(config.model.weights),
    )


def model_shape(config: Config) -> ModelShape:
    """The sizes of the model among the settings."""
    settable = {field.name for field in fields(ModelConfig)}
    names = [field.name for field in fields(ModelShape) if field.name in settable]
    return ModelShape(**{name: getattr(config.model, name) for name in names})


def stage_plans(config: Config) -> tuple[StagePlan, ...]:
    """Which layers each (virtual) stage holds, the weight of the MLM head at the masked positions considered."""
    model = config.model
    costs = stage_costs(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        sequence_length=config.data.sequence_length,
        predicted_share=config.objective.masking.probability,
    )
    return partition(
        model.num_hidden_layers,
        config.parallel.pipeline * config.parallel.virtual,
        embedding_cost=costs.embedding,
        head_cost=costs.head,
    )


def tokenizer_name(config: Config) -> str:
    """Name under which the tokenizer goes along with a pretraining run and its checkpoints."""
    return "tokenizer.json" if Path(config.data.tokenizer).suffix == ".json" else "vocab.txt"
