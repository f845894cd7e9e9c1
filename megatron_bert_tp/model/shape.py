"""The numbers that make a MegatronBert, and the names and shapes of its tensors in Hugging Face's format.

Names always carry the prefix ``bert.``; only the files of a bare `MegatronBertModel` leave it out, and
`formats` adds and removes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes under the names of `transformers.MegatronBertConfig`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    num_labels: int = 2

    @property
    def is_relative(self) -> bool:
        """Whether attention scores see distances instead of the input seeing positions."""
        return self.position_embedding_type != "absolute"

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads


ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
POSITION_EMBEDDING_TYPES = ("absolute", "relative_key", "relative_key_query")


@dataclass(frozen=True)
class Head:
    """What stands on the encoder: one for each class of Hugging Face's family.

    ``linear`` names a linear layer over the pooled output or, without a pooler, over every position.  It has
    ``num_outputs`` rows, or ``num_labels`` where that is None, and dropout before it where ``has_dropout``.
    """

    architecture: str
    has_pooler: bool = False
    has_predictions: bool = False
    has_next_sentence: bool = False
    linear: str | None = None
    num_outputs: int | None = None
    has_dropout: bool = True

    def rows(self, shape: ModelShape) -> int:
        """Outputs of the linear layer."""
        return self.num_outputs or shape.num_labels


HEADS = {
    head.architecture: head
    for head in (
        Head("MegatronBertModel", has_pooler=True),
        Head("MegatronBertForPreTraining", has_pooler=True, has_predictions=True, has_next_sentence=True),
        Head("MegatronBertForMaskedLM", has_predictions=True),
        Head("MegatronBertForCausalLM", has_predictions=True),
        Head("MegatronBertForNextSentencePrediction", has_pooler=True, has_next_sentence=True),
        Head("MegatronBertForSequenceClassification", has_pooler=True, linear="classifier"),
        Head("MegatronBertForMultipleChoice", has_pooler=True, linear="classifier", num_outputs=1),
        Head("MegatronBertForTokenClassification", linear="classifier"),
        Head("MegatronBertForQuestionAnswering", linear="qa_outputs", num_outputs=2, has_dropout=False),
    )
}
PRETRAINING = HEADS["MegatronBertForPreTraining"]


def tied_names(shape: ModelShape, head: Head = PRETRAINING) -> dict[str, str]:
    """Second copies and the tensors that they copy; files leave the copies out."""
    if not (shape.tie_word_embeddings and head.has_predictions):
        return {}
    return {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}


def tensor_shapes(shape: ModelShape, head: Head = PRETRAINING) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor of a model with ``head``, tied copies left out."""
    return dict(_tensors(shape, head))


def _tensors(shape: ModelShape, head: Head) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocabulary = shape.hidden_size, shape.vocab_size
    yield "bert.embeddings.word_embeddings.weight", (vocabulary, hidden)
    yield "bert.embeddings.position_embeddings.weight", (shape.max_position_embeddings, hidden)
    yield "bert.embeddings.token_type_embeddings.weight", (shape.type_vocab_size, hidden)
    for number in range(shape.num_hidden_layers):
        yield from _layer_tensors(f"bert.encoder.layer.{number}", shape)
    yield from _affine("bert.encoder.ln", (hidden,))
    if head.has_pooler:
        yield from _affine("bert.pooler.dense", (hidden, hidden))
    if head.has_predictions:
        yield "cls.predictions.bias", (vocabulary,)
        yield from _affine("cls.predictions.transform.dense", (hidden, hidden))
        yield from _affine("cls.predictions.transform.LayerNorm", (hidden,))
        if not shape.tie_word_embeddings:
            yield "cls.predictions.decoder.weight", (vocabulary, hidden)
    if head.has_next_sentence:
        yield from _affine("cls.seq_relationship", (2, hidden))
    if head.linear:
        yield from _affine(head.linear, (head.rows(shape), hidden))


def _layer_tensors(prefix: str, shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = shape.hidden_size
    yield from _attention_tensors(f"{prefix}.attention", shape)
    if shape.add_cross_attention:
        yield from _attention_tensors(f"{prefix}.crossattention", shape)
    yield from _affine(f"{prefix}.ln", (hidden,))
    yield from _affine(f"{prefix}.intermediate.dense", (shape.intermediate_size, hidden))
    yield from _affine(f"{prefix}.output.dense", (hidden, shape.intermediate_size))


def _attention_tensors(prefix: str, shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = shape.hidden_size
    yield from _affine(f"{prefix}.ln", (hidden,))
    for block in ("query", "key", "value"):
        yield from _affine(f"{prefix}.self.{block}", (hidden, hidden))
    if shape.is_relative:
        # One row for each distance from -(positions - 1) to positions - 1 (Shaw et al. 2018).
        yield f"{prefix}.self.distance_embedding.weight", (2 * shape.max_position_embeddings - 1, shape.head_size)
    yield from _affine(f"{prefix}.output.dense", (hidden, hidden))


def _affine(prefix: str, weight: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.weight", weight
    yield f"{prefix}.bias", weight[:1]
