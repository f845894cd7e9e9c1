"""What a tensor's name and split mean for its update: whether it decays, and which ranks count it in sums."""

from megatron_bert_tp.parallel.sharding import Part


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the tensor: not to biases and LayerNorms."""
    return not name.endswith((".bias", ".ln.weight", ".LayerNorm.weight"))


def is_answered_here(part: Part) -> bool:
    """Whether this rank counts the rectangle in sums over the tensor axis: one copy of each is counted.

    Unlike `Part.is_counted_here`, a tied copy on another stage counts there: it has norms of its own.
    """
    return part.dim is not None or part.axis.is_first
