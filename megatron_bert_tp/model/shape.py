"""The numbers that make a MegatronBert, and the names and shapes of its tensors in Hugging Face's format."""

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

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads


def tied_names(shape: ModelShape) -> dict[str, str]:
    """Second copies and the tensors that they copy; files leave the copies out."""
    if not shape.tie_word_embeddings:
        return {}
    return {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor of a `MegatronBertForPreTraining`, tied copies left out."""
    return dict(_tensors(shape))


def _tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocabulary = shape.hidden_size, shape.vocab_size
    yield "bert.embeddings.word_embeddings.weight", (vocabulary, hidden)
    yield "bert.embeddings.position_embeddings.weight", (shape.max_position_embeddings, hidden)
    yield "bert.embeddings.token_type_embeddings.weight", (shape.type_vocab_size, hidden)
    for number in range(shape.num_hidden_layers):
        yield from _layer_tensors(f"bert.encoder.layer.{number}", hidden, shape.intermediate_size)
    yield from _affine("bert.encoder.ln", (hidden,))
    yield from _affine("bert.pooler.dense", (hidden, hidden))
    yield "cls.predictions.bias", (vocabulary,)
    yield from _affine("cls.predictions.transform.dense", (hidden, hidden))
    yield from _affine("cls.predictions.transform.LayerNorm", (hidden,))
    if not shape.tie_word_embeddings:
        yield "cls.predictions.decoder.weight", (vocabulary, hidden)
    yield from _affine("cls.seq_relationship", (2, hidden))


def _layer_tensors(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _affine(f"{prefix}.attention.ln", (hidden,))
    for block in ("query", "key", "value"):
        yield from _affine(f"{prefix}.attention.self.{block}", (hidden, hidden))
    yield from _affine(f"{prefix}.attention.output.dense", (hidden, hidden))
    yield from _affine(f"{prefix}.ln", (hidden,))
    yield from _affine(f"{prefix}.intermediate.dense", (intermediate, hidden))
    yield from _affine(f"{prefix}.output.dense", (hidden, intermediate))


def _affine(prefix: str, weight: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.weight", weight
    yield f"{prefix}.bias", weight[:1]
