"""Rules that tie several settings together, as one table of small pure functions.

A rule is run when all settings that it reads are valid, whatever else is wrong.  It returns what is
broken, or None.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_bert_tp.config.problems import Problem, listed, shown

WORLD_SIZE = "world size"
_NUM_SHOWN = 12
# Dropout compares 16 random bits: a probability that rounds to 0 of their 65536 values would drop nothing.
_SMALLEST_DROPOUT = 1e-5


@dataclass(frozen=True)
class Broken:
    """The rule that does not hold, with the values, and the way out."""

    rule: str
    way_out: str


@dataclass(frozen=True)
class Rule:
    """A check and the paths of the settings that it takes; the first one is blamed."""

    paths: tuple[str, ...]
    check: Callable[..., Broken | None]


def broken_rules(values: Mapping[str, object], world_size: int | None) -> list[Problem]:
    """Problems of all rules whose settings are in ``values``; rules of the world size if one is given."""
    known = {**values, WORLD_SIZE: world_size}
    return _run(RULES, known)


def world_problems(values: Mapping[str, object], world_size: int) -> list[Problem]:
    """Problems of the rules that read the world size alone."""
    known = {**values, WORLD_SIZE: world_size}
    return _run([rule for rule in RULES if WORLD_SIZE in rule.paths], known)


def divisors(*numbers: int) -> list[int]:
    """Numbers that divide all of ``numbers``, ascending."""
    common = math.gcd(*numbers)
    small = [n for n in range(1, math.isqrt(common) + 1) if common % n == 0]
    return sorted({*small, *(common // n for n in small)})


def _run(rules: Sequence[Rule], values: Mapping[str, object]) -> list[Problem]:
    problems = []
    for rule in rules:
        if all(path in values for path in rule.paths):
            broken = rule.check(*(values[path] for path in rule.paths))
            if broken:
                problems.append(_problem(rule.paths[0], values, broken))
    return problems


def _problem(path: str, values: Mapping[str, object], broken: Broken) -> Problem:
    return Problem(path=path, rule=broken.rule, way_out=broken.way_out, value=shown(values[path]))


def _heads_divide_hidden(hidden: int, heads: int) -> Broken | None:
    if hidden % heads == 0:
        return None
    return Broken(
        f"must be a multiple of model.num_attention_heads ({heads})",
        f"use {_near(hidden, heads)}, or heads that work: {_shortened(divisors(hidden))}",
    )


def _dropout_drops(probability: float) -> Broken | None:
    if probability == 0 or probability >= _SMALLEST_DROPOUT:
        return None
    return Broken(
        f"must be 0 or at least {_SMALLEST_DROPOUT}: dropout works in steps of 1 / 65536",
        f"use 0, or at least {_SMALLEST_DROPOUT}",
    )


def _tensor_divides_heads(tensor: int, heads: int) -> Broken | None:
    if heads % tensor == 0:
        return None
    return Broken(
        f"must divide model.num_attention_heads ({heads})",
        f"tensor sizes that work: {_shortened(divisors(heads))}",
    )


def _tensor_divides_intermediate(tensor: int, intermediate: int) -> Broken | None:
    if intermediate % tensor == 0:
        return None
    return Broken(
        f"must divide model.intermediate_size ({intermediate})",
        f"tensor sizes that work: {_shortened(divisors(intermediate))}",
    )


def _stages_have_layers(pipeline: int, layers: int) -> Broken | None:
    if pipeline <= layers:
        return None
    return Broken(
        f"must not be above model.num_hidden_layers ({layers}): every stage holds at least one layer",
        f"use at most {layers}",
    )


def _sequence_fits_positions(sequence: int, positions: int) -> Broken | None:
    if sequence <= positions:
        return None
    return Broken(
        f"must not be above model.max_position_embeddings ({positions})",
        f"use at most {positions}, or raise model.max_position_embeddings to {sequence}",
    )


def _pad_is_in_vocabulary(pad: int, vocabulary: int) -> Broken | None:
    if pad < vocabulary:
        return None
    return Broken(
        f"must be below model.vocab_size ({vocabulary})",
        f"use the id of [PAD] in data.tokenizer, 0 to {vocabulary - 1}",
    )


def _pairs_have_two_segments(types: int, pairs: str) -> Broken | None:
    if types >= 2 or pairs == "none":
        return None
    return Broken(f"must be at least 2 for objective.pairs = {pairs!r}: a sample has two segments", "use 2")


def _blend_has_weights(weights: tuple[float, ...] | None, corpora: tuple[str, ...]) -> Broken | None:
    if weights is None or (len(weights) == len(corpora) and min(weights) > 0):
        return None
    return Broken(
        f"must hold a share above 0 for each of the {len(corpora)} corpora of data.corpus",
        f"use, for example, {[round(1 / len(corpora), 2)] * len(corpora)}, or leave data.weights out",
    )


def _corpora_differ(corpora: tuple[str, ...]) -> Broken | None:
    twice = sorted({corpus for corpus in corpora if corpora.count(corpus) > 1})
    return Broken("must name each corpus once", f"name {listed(twice)} once") if twice else None


def _shares_leave_room(mask_share: float, random_share: float) -> Broken | None:
    if mask_share + random_share <= 1:
        return None
    return Broken(
        f"plus objective.masking.random_share ({random_share}) must be at most 1",
        f"use at most {1 - random_share:g}, or lower objective.masking.random_share to {1 - mask_share:g}",
    )


def _spans_are_drawn(lengths: str, longest: int) -> Broken | None:
    if lengths == "inverse" or longest > 1:
        return None
    return Broken(
        f"needs objective.masking.longest_span above 1, which is {longest}: no lengths are drawn for single words",
        "set objective.masking.longest_span, for example to 10",
    )


def _warmup_ends(warmup: int, steps: int) -> Broken | None:
    if warmup <= steps:
        return None
    return Broken(
        f"must not be above optimizer.steps ({steps})", f"use at most {steps}, for example {steps // 10}"
    )


def _rate_decays(final: float, highest: float) -> Broken | None:
    if final <= highest:
        return None
    return Broken(
        f"must not be above optimizer.learning_rate ({highest}): the rate decays to it",
        f"use 0 or at most {highest}",
    )


def _split_has_training(split: tuple[float, float, float]) -> Broken | None:
    if min(split) >= 0 and split[0] > 0:
        return None
    return Broken(
        "must hold shares of at least 0, the first one (training) above 0", "use, for example, [96, 4, 0]"
    )


def _split_has_validation(split: tuple[float, float, float], samples: int) -> Broken | None:
    if samples == 0 or split[1] != 0:
        return None
    return Broken(
        f"must leave documents for validation, since run.evaluation_samples is {samples}",
        "use, for example, [96, 4, 0], or run.evaluation_samples: 0",
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
        f"use {_near(batch, share)}{_microbatches(batch, data)}",
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
    return f", or parallel.microbatch: {_shortened(divisors(batch // data))}"


def _near(number: int, step: int) -> str:
    """The multiples of ``step`` below and above ``number``."""
    below = number - number % step
    return listed([size for size in (below, below + step) if size])


def _shortened(sizes: Sequence[int]) -> str:
    text = ", ".join(map(str, sizes[:_NUM_SHOWN]))
    return text if len(sizes) <= _NUM_SHOWN else f"{text}, ..."


RULES: tuple[Rule, ...] = (
    Rule(("model.hidden_size", "model.num_attention_heads"), _heads_divide_hidden),
    Rule(("model.hidden_dropout_prob",), _dropout_drops),
    Rule(("model.attention_probs_dropout_prob",), _dropout_drops),
    Rule(("model.pad_token_id", "model.vocab_size"), _pad_is_in_vocabulary),
    Rule(("model.type_vocab_size", "objective.pairs"), _pairs_have_two_segments),
    Rule(("data.corpus",), _corpora_differ),
    Rule(("data.weights", "data.corpus"), _blend_has_weights),
    Rule(("data.split",), _split_has_training),
    Rule(("data.split", "run.evaluation_samples"), _split_has_validation),
    Rule(("data.sequence_length", "model.max_position_embeddings"), _sequence_fits_positions),
    Rule(("objective.masking.mask_share", "objective.masking.random_share"), _shares_leave_room),
    Rule(("objective.masking.span_lengths", "objective.masking.longest_span"), _spans_are_drawn),
    Rule(("optimizer.warmup_steps", "optimizer.steps"), _warmup_ends),
    Rule(("optimizer.final_learning_rate", "optimizer.learning_rate"), _rate_decays),
    Rule(("parallel.tensor", "model.num_attention_heads"), _tensor_divides_heads),
    Rule(("parallel.tensor", "model.intermediate_size"), _tensor_divides_intermediate),
    Rule(("parallel.pipeline", "model.num_hidden_layers"), _stages_have_layers),
    Rule((WORLD_SIZE, "parallel.tensor", "parallel.pipeline"), _world_is_whole),
    Rule(("parallel.microbatch", "parallel.packing"), _rows_are_cut),
    Rule(("parallel.microbatch_tokens", "parallel.packing", "data.sequence_length"), _bins_hold_a_sample),
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
