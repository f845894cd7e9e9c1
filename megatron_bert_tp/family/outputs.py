"""What the classes return: named fields that can also be read like a tuple of those that are there."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from megatron_bert_tp.family.cache import KeyValueCache

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Output:
    """Fields by name (``output.logits``, ``output["logits"]``) and by place among those that are not None.

    Iterating gives the values, as a tuple would; in `transformers` it gives the names.
    """

    BY_NAME_ALONE: ClassVar[frozenset[str]] = frozenset()
    """Fields that have no place."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order, those left out that `transformers` does not have."""
        return tuple(self[name] for name in self.keys() if name not in self.BY_NAME_ALONE)

    def keys(self) -> list[str]:
        """Names of the fields that are not None, in order."""
        return [each.name for each in fields(self) if getattr(self, each.name) is not None]

    def values(self) -> list[Any]:
        """The fields that are not None, in order."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Names and fields."""
        return list(zip(self.keys(), self.values(), strict=True))

    def get(self, key: str, default: object = None) -> Any:
        """A field by its name, or ``default`` where it is None or there is none of that name."""
        return getattr(self, key) if key in self.keys() else default

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()


@dataclass(frozen=True)
class BaseOutput(Output):
    """Of `MegatronBertModel`: ``[batch, sequence, hidden]``, ``[batch, hidden]``, and what was asked for.

    ``hidden_states`` are the inputs of all layers and then the last hidden state; ``attentions`` one ``[batch,
    heads, queries, keys]`` a layer, after dropout and head mask.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    past_key_values: KeyValueCache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass(frozen=True)
class PreTrainingOutput(Output):
    """Logits ``[batch, sequence, vocabulary]`` and ``[batch, 2]``; ``loss`` is the sum of the last two."""

    BY_NAME_ALONE = frozenset({"masked_lm_loss", "next_sentence_loss"})

    loss: Tensor | None
    prediction_logits: Tensor
    seq_relationship_logits: Tensor
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    masked_lm_loss: Tensor | None = None
    next_sentence_loss: Tensor | None = None


@dataclass(frozen=True)
class LogitsOutput(Output):
    """Of all heads with one kind of logits: whole vocabulary, classes, or choices, in the last dim."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(frozen=True)
class CausalOutput(Output):
    """Of `MegatronBertForCausalLM`: logits ``[batch, kept, vocabulary]``."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: KeyValueCache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass(frozen=True)
class AnswerOutput(Output):
    """Of `MegatronBertForQuestionAnswering`: ``[batch, sequence]`` each."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
