"""Which models Megatron-LM's BERT can hold, and how they can be divided."""

from collections.abc import Iterator

from megatron_bert_tp.errors import FormatError, LayoutError
from megatron_bert_tp.formats.megatron.write import ACTIVATIONS
from megatron_bert_tp.model.shape import Head, ModelShape

_HEADS = ("MegatronBertForPreTraining", "MegatronBertForMaskedLM")
_TOKEN_TYPES = 2


def check_exportable(shape: ModelShape, head: Head) -> None:
    """FormatError with every reason why Megatron-LM has no such model."""
    reasons = list(_reasons(shape, head))
    if reasons:
        raise FormatError("\n".join(["this model cannot become a Megatron-LM checkpoint:", *reasons]))


def check_divisible(shape: ModelShape, *, tensor: int, pipeline: int) -> None:
    """LayoutError, with sizes that work, unless the model divides by the layout; Megatron-LM has no remainders."""
    for what, size, by, axis in (
        ("num_attention_heads", shape.num_attention_heads, tensor, "tensor"),
        ("intermediate_size", shape.intermediate_size, tensor, "tensor"),
        ("num_hidden_layers", shape.num_hidden_layers, pipeline, "pipeline"),
    ):
        if by < 1 or size % by:
            work = ", ".join(str(count) for count in range(1, min(size, 64) + 1) if size % count == 0)
            raise LayoutError(f"{what} ({size}) must be a multiple of the {axis} size ({by}); {work} divide it")


def _reasons(shape: ModelShape, head: Head) -> Iterator[str]:
    if head.architecture not in _HEADS:
        yield f"  {head.architecture}: its pretraining classes alone have a place there: {' and '.join(_HEADS)}"
    if shape.is_decoder or shape.add_cross_attention:
        yield "  is_decoder, add_cross_attention: its BERT is an encoder"
    if shape.is_relative:
        yield f"  position_embedding_type {shape.position_embedding_type}: its positions are absolute"
    if shape.hidden_act not in ACTIVATIONS:
        yield f"  hidden_act {shape.hidden_act}: it has {' and '.join(ACTIVATIONS)}"
    if not shape.tie_word_embeddings:
        yield "  tie_word_embeddings false: its word embeddings and its output weights are one"
    if head.has_next_sentence and shape.type_vocab_size != _TOKEN_TYPES:
        yield f"  type_vocab_size {shape.type_vocab_size}: with a binary head it has {_TOKEN_TYPES} token types"
