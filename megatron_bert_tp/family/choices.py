"""Arguments of multiple choice: every choice of every sample becomes a row of its own."""

from dataclasses import replace

from torch import Tensor

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.family.arguments import Arguments


def flattened(arguments: Arguments) -> tuple[Arguments, int]:
    """``[batch, choices, ...]`` to ``[batch x choices, ...]``, and the number of choices.

    The sample numbers of a sample are spread over its choices.  ArgumentError without the dim of choices.
    """
    words = arguments.words
    expected = 4 if words.is_floating_point() else 3
    if words.dim() != expected:
        raise ArgumentError(
            f"the input of multiple choice has the shape {tuple(words.shape)}; give [batch, choices, sequence], "
            "or [batch, choices, sequence, hidden] of inputs_embeds"
        )
    mask = arguments.attention_mask
    if mask is not None and mask.dim() < 3:
        raise ArgumentError(
            f"attention_mask of multiple choice has the shape {tuple(mask.shape)}; give [batch, choices, sequence]"
        )
    choices = words.shape[1]
    numbers = arguments.sample_numbers
    if numbers is not None:
        numbers = tuple(number * choices + choice for number in numbers for choice in range(choices))
    flat = replace(
        arguments,
        input_ids=_rows(arguments.input_ids),
        inputs_embeds=_rows(arguments.inputs_embeds),
        attention_mask=_rows(arguments.attention_mask),
        token_type_ids=_rows(arguments.token_type_ids),
        position_ids=_rows(arguments.position_ids),
        sample_numbers=numbers,
    )
    return flat, choices


def _rows(given: Tensor | None) -> Tensor | None:
    return None if given is None else given.flatten(0, 1)
