"""Rules of the dropout of a model, in pretraining and in tasks."""

from megatron_bert_tp.config.rule import Broken, Rule

# Dropout compares 16 random bits: a probability that rounds to 0 of their 65536 values would drop nothing.
_SMALLEST_DROPOUT = 1e-5


def _dropout_drops(probability: float | None) -> Broken | None:
    if not probability or probability >= _SMALLEST_DROPOUT:
        return None
    return Broken(
        f"must be 0 or at least {_SMALLEST_DROPOUT}: dropout works in steps of 1 / 65536",
        f"use 0, or at least {_SMALLEST_DROPOUT}",
    )


DROPOUT_RULES: tuple[Rule, ...] = (
    Rule(("model.hidden_dropout_prob",), _dropout_drops),
    Rule(("model.attention_probs_dropout_prob",), _dropout_drops),
)
