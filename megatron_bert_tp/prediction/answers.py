"""From what the model gives for the rows of a line to the record that is written; pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.prediction.heads import Output, Setup
from megatron_bert_tp.prediction.samples import Sample
from megatron_bert_tp.text.encoder import Row, TextEncoder

Record = dict[str, JSON]
Answer = Callable[[Sample, Sequence[Row], Sequence[Output], Setup], Record]
Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Word:
    """One entry of the vocabulary in the place of a [MASK]."""

    token_str: str
    token: int
    score: float


def filled_masks(sample: Sample, _rows: Sequence[Row], outputs: Sequence[Output], setup: Setup) -> Record:
    """The likeliest words of every [MASK] of the text."""
    (output,) = outputs
    masks = [[asdict(word) for word in words] for words in words_of_masks(output, setup.encoder)]
    return {"text": sample.text, "masks": masks}


def following(_sample: Sample, _rows: Sequence[Row], outputs: Sequence[Output], _setup: Setup) -> Record:
    """The probability that B follows A: label 0 of Hugging Face's head."""
    ((logits,),) = outputs
    return {"follows": logits.softmax(-1)[0].item()}


def classes(_sample: Sample, _rows: Sequence[Row], outputs: Sequence[Output], setup: Setup) -> Record:
    """Labels with their scores, the best first."""
    ((logits,),) = outputs
    scores = activation_of(setup.problem_type, len(logits))(logits).tolist()
    named = sorted(zip(setup.labels, scores, strict=True), key=lambda pair: -pair[1])
    return {"labels": [{"label": label, "score": score} for label, score in named[: setup.options.top]]}


def choice(_sample: Sample, _rows: Sequence[Row], outputs: Sequence[Output], _setup: Setup) -> Record:
    """Number of the best choice, from 0, and the probabilities of all."""
    logits = torch.cat([logit for (logit,) in outputs])
    return {"best": int(logits.argmax()), "scores": logits.softmax(-1).tolist()}


def states(_sample: Sample, _rows: Sequence[Row], outputs: Sequence[Output], _setup: Setup) -> Record:
    """Hidden states as they are."""
    ((values,),) = outputs
    return {"features": values.tolist()}


def activation_of(problem_type: str | None, num_labels: int) -> Activation:
    """What makes scores of logits: what `transformers`' pipeline takes for these settings."""
    if problem_type == "regression":
        return lambda logits: logits
    if problem_type == "multi_label_classification" or num_labels == 1:
        return torch.sigmoid
    return lambda logits: logits.softmax(-1)


def words_of_masks(output: Output, encoder: TextEncoder) -> list[list[Word]]:
    """The likeliest words of every [MASK] of one row, the best first."""
    scores, ids = output
    return [
        [Word(encoder.text_of(number), number, score) for score, number in zip(*each, strict=True)]
        for each in zip(scores.tolist(), ids.tolist(), strict=True)
    ]
