"""Which model a checkpoint is of, and whether that is the model of a run."""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.errors import CheckpointError, MegatronBertError
from megatron_bert_tp.model.shape import (
    ACTIVATIONS,
    HEADS,
    POSITION_EMBEDDING_TYPES,
    PRETRAINING,
    Head,
    ModelShape,
    tensor_shapes,
)

MODEL = "model"
"""Fact under which the numbers of the model stand: a `ModelShape` as an object."""
ARCHITECTURE = "architecture"
"""Fact under which the name of the model's class stands, as in `model.shape.HEADS`."""
_FREE = {"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "num_labels"}
_KINDS: dict[object, str] = {int: "a whole number in the possible range", float: "a number", bool: "true or false"}
_CHOICES = {"hidden_act": ACTIVATIONS, "position_embedding_type": POSITION_EMBEDDING_TYPES}
_SHARES = {"hidden_dropout_prob", "attention_probs_dropout_prob"}  # of 1 nothing would be left
_LARGEST = 2**31  # of any size
# Layers and labels, whose names are listed before anything is compared.
_MOST = {"num_hidden_layers": 10_000, "num_labels": 100_000}


def check_model(checkpoint: Checkpoint, shape: ModelShape, head: Head = PRETRAINING) -> None:
    """CheckpointError, with what differs, unless the checkpoint is of the model ``shape`` with that ``head``.

    Dropout probabilities and the initializer range may differ, and the number of labels where nothing has them.
    """
    found = head_of(checkpoint)
    if found != head:
        raise CheckpointError(f"{checkpoint.directory}: {missing_heads(shape, found, head)}")
    differing = differences(shape_of(checkpoint), shape)
    if differing:
        raise CheckpointError(
            f"{checkpoint.directory}: the checkpoint is of another model than the settings:\n{differing}\n"
            "set these to the checkpoint's values, or give another checkpoint"
        )
    check_tensors(checkpoint, shape, head)


def head_of(checkpoint: Checkpoint) -> Head:
    """The class of a checkpoint; one that does not say it is of a `MegatronBertForPreTraining`.

    A bare `MegatronBertModel` may have been saved without its pooler.
    """
    name = checkpoint.facts.get(ARCHITECTURE, PRETRAINING.architecture)
    if not isinstance(name, str) or name not in HEADS:
        raise CheckpointError(
            f"{checkpoint.directory}: its facts name the class {name!r}; known are {', '.join(HEADS)}"
        )
    head = HEADS[name]
    is_bare = name == "MegatronBertModel" and "bert.pooler.dense.weight" not in checkpoint.shapes("weight")
    return replace(head, has_pooler=False) if is_bare else head


def missing_heads(shape: ModelShape, head: Head, wanted: Head = PRETRAINING) -> str:
    """Why weights of the class ``head`` are not those of the class that a run needs: what is not in them."""
    missing = [name for name in tensor_shapes(shape, wanted) if name not in tensor_shapes(shape, head)]
    needs = "pretraining needs" if wanted == PRETRAINING else "this run needs"
    return (
        f"the weights are of a {head.architecture}, but {needs} those of a {wanted.architecture}; "
        f"missing are {', '.join(missing)}. Give the weights from which that model was made"
    )


def shape_of(checkpoint: Checkpoint) -> ModelShape:
    """The model of a checkpoint; CheckpointError when its facts do not say it."""
    model = checkpoint.facts.get(MODEL)
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{checkpoint.directory}: its facts do not say the model; was it saved by a run?")
    return parse_shape(model, source=str(checkpoint.directory), error=CheckpointError)


def parse_shape(values: Mapping[str, JSON], *, source: str, error: type[MegatronBertError]) -> ModelShape:
    """`ModelShape` from JSON; raises ``error`` that lists all missing and impossible numbers."""
    kinds = {field.name: field.type for field in fields(ModelShape)}
    optional = {field.name: field.default for field in fields(ModelShape) if field.default is not MISSING}
    values = {**optional, **values}
    problems = [
        f"  {name}: {values[name]!r} is not {_possible(name, kind)}" if name in values else f"  {name}: is missing"
        for name, kind in kinds.items()
        if name not in values or not _is_possible(name, values[name], kind)
    ]
    if problems:
        raise error("\n".join([f"{source}: does not describe a MegatronBert:", *problems]))
    shape = ModelShape(**{name: values[name] for name in kinds})  # type: ignore[arg-type]
    if shape.hidden_size % shape.num_attention_heads or shape.pad_token_id >= shape.vocab_size:
        raise error(
            f"{source}: hidden_size ({shape.hidden_size}) must be a multiple of num_attention_heads "
            f"({shape.num_attention_heads}), and pad_token_id ({shape.pad_token_id}) below vocab_size "
            f"({shape.vocab_size})"
        )
    if shape.add_cross_attention and not shape.is_decoder:
        raise error(f"{source}: add_cross_attention needs is_decoder: an encoder has nothing to look at; set both")
    return shape


def differences(there: ModelShape, here: ModelShape) -> str:
    """One line for each number that makes them different models; empty when none does."""
    saved, wanted = asdict(there), asdict(here)
    return "\n".join(
        f"  model.{name}: {saved[name]} there, {wanted[name]} in the settings"
        for name in wanted
        if name not in _FREE and saved[name] != wanted[name]
    )


def check_tensors(checkpoint: Checkpoint, shape: ModelShape, head: Head = PRETRAINING) -> None:
    """CheckpointError unless the weights have the names and shapes that the model with ``head`` says."""
    found, expected = checkpoint.shapes("weight"), tensor_shapes(shape, head)
    lines = [
        f"  {name}: {found.get(name, 'missing')}, should be {expected.get(name, 'absent')}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if lines:
        more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise CheckpointError(
            "\n".join([f"{checkpoint.directory}: its weights are not of its model:", *lines[:10], *more])
        )


def _possible(name: str, kind: object) -> str:
    return f"one of {', '.join(_CHOICES[name])}" if name in _CHOICES else _KINDS[kind]


def _is_possible(name: str, value: JSON, kind: object) -> bool:
    if kind is str:
        return value in _CHOICES[name]
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        largest = 1 if name in _SHARES else sys.float_info.max
        return isinstance(value, int | float) and 0 <= value <= largest and not (name in _SHARES and value == 1)
    smallest = 0 if name == "pad_token_id" else 1
    return isinstance(value, int) and smallest <= value <= _MOST.get(name, _LARGEST)
