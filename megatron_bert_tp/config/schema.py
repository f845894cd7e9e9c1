"""Every setting of pretraining, as frozen dataclasses: name, type, default, bounds and one line of meaning.

`model`, `data`, `objective` and `optimizer` say what is learned; `parallel` and `run` say how it runs
and never change the loss curve beyond rounding.  Model settings carry Hugging Face's names.
`config.task_schema` has those of tasks; `UpdateConfig`, `ParallelConfig` and `RunConfig` serve both.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def setting(
    default: object = None,
    meaning: str = "",
    *,
    required: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Dataclass field with its meaning and its allowed range; ``required`` fields have no default."""
    metadata = {"meaning": meaning, "at_least": at_least, "above": above, "at_most": at_most, "below": below}
    if required:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the MegatronBert, under the names of `transformers.MegatronBertConfig`."""

    vocab_size: int = setting(required=True, meaning="entries of the vocabulary", at_least=1)
    hidden_size: int = setting(required=True, meaning="features of a hidden state", at_least=1)
    num_hidden_layers: int = setting(required=True, meaning="transformer layers", at_least=1)
    num_attention_heads: int = setting(required=True, meaning="attention heads per layer", at_least=1)
    intermediate_size: int = setting(required=True, meaning="features inside the MLP", at_least=1)
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = setting(
        "gelu", "activation of the MLP and of the MLM head; gelu_new is the tanh approximation"
    )
    hidden_dropout_prob: float = setting(0.1, "dropout on hidden states", at_least=0, at_most=0.99)
    attention_probs_dropout_prob: float = setting(
        0.1, "dropout on attention probabilities", at_least=0, at_most=0.99
    )
    max_position_embeddings: int = setting(512, "longest sequence that the model can read", at_least=1)
    position_embedding_type: Literal["absolute", "relative_key", "relative_key_query"] = setting(
        "absolute", "positions added to the input, or distances in the attention scores"
    )
    type_vocab_size: int = setting(2, "kinds of segments (token types)", at_least=1)
    initializer_range: float = setting(0.02, "standard deviation of initial weights", above=0)
    layer_norm_eps: float = setting(1e-12, "epsilon inside every LayerNorm", above=0)
    pad_token_id: int = setting(0, "id of [PAD], whose embedding stays zero", at_least=0)
    tie_word_embeddings: bool = setting(True, "use the word embeddings as the MLM projection")
    weights: str | None = setting(None, "start from this Hugging Face directory or checkpoint")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What text is read, and how much of it a sample holds."""

    corpus: tuple[str, ...] = setting(
        required=True, meaning="corpus prefix made by `preprocess` (PREFIX.bin, PREFIX.idx); a list is blended"
    )
    weights: tuple[float, ...] | None = setting(
        None, "shares of the corpora of a blend in the samples; null: as many as each has"
    )
    tokenizer: str = setting(required=True, meaning="vocab.txt or tokenizer.json of the corpus")
    lowercase: bool = setting(True, "whether a vocab.txt is uncased (tokenizer.json says it itself)")
    split: tuple[float, float, float] = setting(
        (96.0, 4.0, 0.0), "shares of documents for training, validation and test"
    )
    sequence_length: int = setting(512, "tokens of a sample, special ones included", at_least=8)


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which tokens the masked language model has to restore."""

    probability: float = setting(0.15, "share of tokens to predict", above=0, below=1)
    mask_share: float = setting(0.8, "of these, share shown as [MASK]", at_least=0, at_most=1)
    random_share: float = setting(0.1, "of these, share shown as a random token", at_least=0, at_most=1)
    whole_words: bool = setting(True, "choose whole words instead of single WordPieces")
    longest_span: int = setting(1, "most neighbouring words hidden together", at_least=1, at_most=64)
    span_lengths: Literal["inverse", "geometric"] = setting(
        "inverse", "how often n words are hidden together: as 1 / n, or as (1 - span_stop)^(n - 1)"
    )
    span_stop: float = setting(0.2, "geometric spans: chance that a span ends after a word", above=0, below=1)
    maximum: int | None = setting(None, "most tokens of a sample to predict; null: no limit", at_least=1)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The pretraining task."""

    pairs: Literal["nsp", "sop", "none"] = setting(
        "nsp", "sentence-pair task: next sentence prediction, sentence order prediction, or one segment"
    )
    short_sequences: float = setting(0.1, "share of samples with a random shorter length", at_least=0, at_most=1)
    masking: MaskingConfig = field(default_factory=MaskingConfig)


@dataclass(frozen=True, kw_only=True)
class BatchRampConfig:
    """Smaller global batches at the beginning; all three settings, or none."""

    start: int | None = setting(None, "samples of the first steps; null: no ramp", at_least=1)
    increment: int | None = setting(None, "samples by which the batch grows at a time", at_least=1)
    samples: int | None = setting(None, "samples after which the batch is optimizer.global_batch", at_least=1)


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """What keeps the gradients of float16 in range."""

    initial: float = setting(65536.0, "factor on the loss at first", above=0)
    growth_interval: int = setting(1000, "finite steps after which the factor doubles", at_least=1)
    hysteresis: int = setting(2, "overflow at which the factor is first halved", at_least=1)
    minimum: float = setting(1.0, "smallest factor", above=0)
    most_skips: int = setting(50, "skipped steps in a row at which a run gives up", at_least=1)


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How the weights move, whatever is learned."""

    name: Literal["adamw", "lamb", "sgd"] = setting("adamw", "update rule")
    global_batch: int = setting(required=True, meaning="samples per optimizer step, over all ranks", at_least=1)
    steps: int | None = setting(
        None, "optimizer steps of the whole run; null: those of optimizer.epochs", at_least=1
    )
    learning_rate: float = setting(1e-4, "highest learning rate", above=0)
    final_learning_rate: float = setting(0.0, "rate that the decay reaches after the last step", at_least=0)
    beta1: float = setting(0.9, "decay of the first moment (adamw, lamb)", at_least=0, below=1)
    beta2: float = setting(0.999, "decay of the second moment (adamw, lamb)", at_least=0, below=1)
    epsilon: float = setting(1e-8, "added to the root of the second moment (adamw, lamb)", above=0)
    momentum: float = setting(0.9, "decay of the sum of gradients (sgd)", at_least=0, below=1)
    weight_decay: float = setting(
        0.01, "weight decay, decoupled but for sgd; not on biases and LayerNorms", at_least=0
    )
    clip_norm: float = setting(1.0, "largest gradient norm; 0 never clips", at_least=0)
    precision: Literal["float32", "float64", "bfloat16", "float16"] = setting(
        "float32", "number format of computing; below 32 bits the optimizer keeps float32 weights"
    )
    seed: int = setting(1234, "seed of weights, data order, masks and dropout", at_least=0, below=2**63)
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(UpdateConfig):
    """How the weights move."""

    steps: int = setting(required=True, meaning="optimizer steps of the whole run", at_least=1)
    schedule: Literal["linear", "cosine", "constant", "inverse_square_root", "wsd"] = setting(
        "linear", "learning rate after the warm-up; wsd is the highest, then decays at the end of the run"
    )
    schedule_unit: Literal["steps", "samples"] = setting(
        "steps", "what the schedule counts; its lengths are the settings that end in this word"
    )
    warmup_steps: int = setting(0, "steps of linear warm-up from learning_rate / warmup_steps", at_least=0)
    warmup_samples: int = setting(0, "samples of linear warm-up", at_least=0)
    decay_steps: int | None = setting(
        None, "steps of the decay, for wsd the last ones; null: from the warm-up to the end", at_least=1
    )
    decay_samples: int | None = setting(
        None, "samples of the decay, for wsd the last ones; null: from the warm-up to the end", at_least=1
    )
    final_weight_decay: float | None = setting(
        None, "weight decay that a ramp reaches after the last step", at_least=0
    )
    weight_decay_ramp: Literal["constant", "linear", "cosine"] = setting(
        "constant", "curve from weight_decay to final_weight_decay over the run"
    )
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is spread; the data size is world size / (tensor x pipeline)."""

    tensor: int = setting(1, "ranks that share every layer", at_least=1)
    sequence: bool = setting(False, "split LayerNorm, dropout and residual over the tensor ranks too")
    pipeline: int = setting(1, "ranks in a row that the layers are cut over", at_least=1)
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "file"] = setting(
        "1f1b", "order of forward and backward passes; file: as parallel.schedule_file has it"
    )
    schedule_file: str | None = setting(None, "schedule written by hand; see docs/schedules.md")
    virtual: int = setting(1, "stages of one rank: any number for interleaved, 2 for zb-v", at_least=1)
    overlap_messages: bool = setting(False, "start messages between stages early and wait for them late")
    shard_optimizer: bool = setting(False, "share out the optimizer's work and memory over the data ranks")
    recompute: Literal["none", "selective", "full"] = setting(
        "none", "compute again in the backward: nothing, attention's core, or whole layers"
    )
    recompute_every: int = setting(1, "recompute in every n-th layer", at_least=1)
    packing: Literal["none", "bins", "packed"] = setting(
        "none", "rows of a microbatch: samples in order, of like lengths, or several samples in one row"
    )
    microbatch: int | None = setting(
        None, "samples of one forward pass on one replica, where packing is none", at_least=1
    )
    microbatch_tokens: int | None = setting(
        None, "most tokens of one forward pass on one replica, padding included, for bins and packed", at_least=8
    )
    bucket_megabytes: int = setting(
        25, "size of the buckets in which gradients cross the data axis", at_least=1, at_most=4096
    )


@dataclass(frozen=True, kw_only=True)
class AnomaliesConfig:
    """What happens where numbers go wrong."""

    not_finite: Literal["stop", "skip"] = setting(
        "stop", "a loss or gradient that is not finite ends the run, or its step moves nothing"
    )
    spike: Literal["report", "skip", "stop"] = setting(
        "report", "a spike of the gradient norm is reported, or its step moves nothing, or ends the run"
    )
    spike_factor: float | None = setting(
        10.0, "a norm above so many times the median of the latest norms is a spike; null: none is", above=1
    )
    spike_window: int = setting(50, "latest norms that are looked at", at_least=5, at_most=10_000)
    most_skips: int = setting(10, "skipped steps in a row at which a run gives up", at_least=1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, how often, and on what it runs; the same for pretraining and for tasks."""

    directory: str = setting(required=True, meaning="folder for metrics.jsonl, checkpoints and config.yaml")
    resume: str = setting(
        "auto", "auto: newest whole checkpoint of the folder; never: start anew; or a checkpoint"
    )
    allow_changes: bool = setting(False, "go on though settings that decide the loss curve have changed")
    save_every: int = setting(1000, "steps between checkpoints (the last step always saves)", at_least=1)
    keep_last: int = setting(2, "newest checkpoints that are kept", at_least=1)
    keep_every: int | None = setting(
        None, "besides, checkpoints whose step is a multiple of this are kept for good", at_least=1
    )
    save_in_background: bool = setting(True, "train on while a checkpoint is written")
    save_failure: Literal["stop", "continue"] = setting(
        "stop", "a checkpoint that cannot be written ends the run, or is told and tried again when the next is due"
    )
    stop_after: str | None = setting(None, "save and stop in time for this, such as 3h50m or 45m; null: never")
    requeue: bool = setting(False, "under SLURM: put the job back into the queue when it stops before its end")
    data_workers: int = setting(
        0, "processes that make batches ahead; 0: a thread of the training process", at_least=0, at_most=64
    )
    log_every: int = setting(1, "steps between console lines (every step is in metrics.jsonl)", at_least=1)
    check_replicas_every: int = setting(
        100, "steps between checks that ranks which hold the same parameters agree; 0 never checks", at_least=0
    )
    stragglers_every: int = setting(
        50, "steps between comparisons of the ranks' speed; 0 never compares", at_least=0
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU where torch sees one, else the CPU")
    fused: Literal["torch", "apex"] = setting(
        "torch", "whose fused kernels run: torch's, or NVIDIA's apex where it is installed"
    )
    timeout_seconds: float = setting(
        600.0, "longest silence of a rank at the start, while saving and in messages, before a run fails", above=0
    )
    step_timeout_seconds: float | None = setting(
        None, "longest silence of a rank within a step; null: 10 median steps, 60 s at least", above=0
    )
    anomalies: AnomaliesConfig = field(default_factory=AnomaliesConfig)


@dataclass(frozen=True, kw_only=True)
class PretrainingRunConfig(RunConfig):
    """Where a run writes, how often, and on what it runs."""

    evaluate_every: int = setting(1000, "steps between evaluations (the last step always evaluates)", at_least=1)
    evaluation_samples: int = setting(512, "held-out samples of an evaluation; 0 never evaluates", at_least=0)
    index_cache: str | None = setting(None, "folder for sample indexes; null: beside each corpus")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    run: PretrainingRunConfig
