"""Rules that tie several settings of pretraining together, as one table of small pure functions."""

from megatron_bert_tp.config.dropout_rules import DROPOUT_RULES
from megatron_bert_tp.config.optimizer_rules import OPTIMIZER_RULES
from megatron_bert_tp.config.parallel_rules import PARALLEL_RULES
from megatron_bert_tp.config.problems import listed
from megatron_bert_tp.config.rule import Broken, Rule, divisors, near, shortened
from megatron_bert_tp.config.run_rules import RUN_RULES


def _heads_divide_hidden(hidden: int, heads: int) -> Broken | None:
    if hidden % heads == 0:
        return None
    return Broken(
        f"must be a multiple of model.num_attention_heads ({heads})",
        f"use {near(hidden, heads)}, or heads that work: {shortened(divisors(hidden))}",
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


RULES: tuple[Rule, ...] = (
    Rule(("model.hidden_size", "model.num_attention_heads"), _heads_divide_hidden),
    *DROPOUT_RULES,
    Rule(("model.pad_token_id", "model.vocab_size"), _pad_is_in_vocabulary),
    Rule(("model.type_vocab_size", "objective.pairs"), _pairs_have_two_segments),
    Rule(("data.corpus",), _corpora_differ),
    Rule(("data.weights", "data.corpus"), _blend_has_weights),
    Rule(("data.split",), _split_has_training),
    Rule(("data.split", "run.evaluation_samples"), _split_has_validation),
    Rule(("data.sequence_length", "model.max_position_embeddings"), _sequence_fits_positions),
    Rule(("objective.masking.mask_share", "objective.masking.random_share"), _shares_leave_room),
    Rule(("objective.masking.span_lengths", "objective.masking.longest_span"), _spans_are_drawn),
    *OPTIMIZER_RULES,
    *PARALLEL_RULES,
    *RUN_RULES,
)
