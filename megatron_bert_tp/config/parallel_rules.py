"""Rules of ``parallel`` and of the world size."""

from megatron_bert_tp.config.problems import listed
from megatron_bert_tp.config.rule import WORLD_SIZE, Broken, Rule, divisors, near, shortened

# Stages of a rank, where the schedule leaves no choice.
_VIRTUAL = {"gpipe": 1, "1f1b": 1, "zb-h1": 1, "zb-v": 2}


def _tensor_divides_heads(tensor: int, heads: int) -> Broken | None:
    if heads % tensor == 0:
        return None
    return Broken(
        f"must divide model.num_attention_heads ({heads})",
        f"tensor sizes that work: {shortened(divisors(heads))}",
    )


def _tensor_divides_intermediate(tensor: int, intermediate: int) -> Broken | None:
    if intermediate % tensor == 0:
        return None
    return Broken(
        f"must divide model.intermediate_size ({intermediate})",
        f"tensor sizes that work: {shortened(divisors(intermediate))}",
    )


def _stages_have_layers(pipeline: int, virtual: int, layers: int) -> Broken | None:
    if pipeline * virtual <= layers:
        return None
    stages = f"x parallel.virtual ({virtual}) " if virtual > 1 else ""
    return Broken(
        f"{stages}must not be above model.num_hidden_layers ({layers}): every stage holds at least one layer",
        f"use at most {layers // virtual}" if layers >= virtual else f"use parallel.virtual of at most {layers}",
    )


def _schedule_has_stages(virtual: int, schedule: str) -> Broken | None:
    fixed = _VIRTUAL.get(schedule)
    if fixed is None or virtual == fixed:
        return None
    return Broken(
        f"must be {fixed} where parallel.schedule is {schedule}",
        f"use {fixed}" if fixed > 1 else "use 1, or parallel.schedule: interleaved",
    )


def _file_is_named(file: str | None, schedule: str) -> Broken | None:
    if (file is None) == (schedule != "file"):
        return None
    if file is None:
        return Broken("is required where parallel.schedule is file", "name the file, or choose another schedule")
    return Broken(
        f"is given, but parallel.schedule is {schedule}", "set parallel.schedule: file, or leave the file out"
    )


def _something_is_recomputed(every: int, recompute: str) -> Broken | None:
    if every == 1 or recompute != "none":
        return None
    return Broken(
        "says in which layers, but parallel.recompute is none", "set parallel.recompute, or leave this at 1"
    )


def _rows_are_cut(microbatch: int | None, packing: str) -> Broken | None:
    if packing != "none" or microbatch is not None:
        return None
    return Broken(
        "is required where parallel.packing is none",
        "give the samples of one forward pass, for example parallel.microbatch: 4",
    )


def _bins_hold_a_sample(tokens: int | None, packing: str, sequence: int) -> Broken | None:
    longest = -(-sequence // 8) * 8
    if packing == "none" or (tokens is not None and tokens >= longest):
        return None
    return Broken(
        f"must be at least data.sequence_length ({sequence}) rounded up to 8, where parallel.packing is "
        f"{packing}",
        f"give the tokens of one forward pass, for example parallel.microbatch_tokens: {8 * longest}",
    )


def _batch_is_whole(
    batch: int, microbatch: int | None, packing: str, tensor: int, pipeline: int, world: int | None
) -> Broken | None:
    if packing != "none" or microbatch is None:
        return None
    replica = tensor * pipeline
    # A world size that does not fit is told by its own rule; the microbatch must fit in any case.
    data = world // replica if world and world % replica == 0 else 1
    share = microbatch * data
    if batch % share == 0:
        return None
    return Broken(
        f"must be a multiple of {share} = parallel.microbatch ({microbatch}) x data size ({data})",
        f"use {near(batch, share)}{_microbatches(batch, data)}",
    )


def _world_is_whole(world: int | None, tensor: int, pipeline: int) -> Broken | None:
    replica = tensor * pipeline
    if world is None or world % replica == 0:
        return None
    sizes = [replica, 2 * replica, 4 * replica]
    return Broken(
        f"must be a multiple of {replica} = parallel.tensor ({tensor}) x parallel.pipeline ({pipeline})",
        f"start {listed(sizes)} processes, for example with torchrun --nproc_per_node={replica}, or use "
        f"parallel.tensor and parallel.pipeline whose product divides {world}",
    )


def _microbatches(batch: int, data: int) -> str:
    """Hint at the sizes of a microbatch that divide the batch as it is; empty where none can."""
    if batch % data:
        return ""
    return f", or parallel.microbatch: {shortened(divisors(batch // data))}"


MODEL_RULES: tuple[Rule, ...] = (
    Rule(("parallel.tensor", "model.num_attention_heads"), _tensor_divides_heads),
    Rule(("parallel.tensor", "model.intermediate_size"), _tensor_divides_intermediate),
    Rule(("parallel.pipeline", "parallel.virtual", "model.num_hidden_layers"), _stages_have_layers),
)
"""Rules that read sizes of the model; those of a task come with its weights."""
LAYOUT_RULES: tuple[Rule, ...] = (
    Rule(("parallel.virtual", "parallel.schedule"), _schedule_has_stages),
    Rule(("parallel.schedule_file", "parallel.schedule"), _file_is_named),
    Rule(("parallel.recompute_every", "parallel.recompute"), _something_is_recomputed),
    Rule((WORLD_SIZE, "parallel.tensor", "parallel.pipeline"), _world_is_whole),
    Rule(("parallel.microbatch", "parallel.packing"), _rows_are_cut),
    Rule(("parallel.microbatch_tokens", "parallel.packing", "data.sequence_length"), _bins_hold_a_sample),
)
BATCH_RULES: tuple[Rule, ...] = (
    Rule(
        (
            "optimizer.global_batch",
            "parallel.microbatch",
            "parallel.packing",
            "parallel.tensor",
            "parallel.pipeline",
            WORLD_SIZE,
        ),
        _batch_is_whole,
    ),
)
"""Rules of a step, which an evaluation does not make."""
PARALLEL_RULES = (*MODEL_RULES, *LAYOUT_RULES, *BATCH_RULES)
