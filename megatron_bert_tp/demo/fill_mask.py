"""Words for the [MASK]s of a sentence, from exported weights."""

from dataclasses import replace
from pathlib import Path

from megatron_bert_tp.prediction.answers import words_of_masks
from megatron_bert_tp.prediction.arguments import Options
from megatron_bert_tp.prediction.predictor import Predictor


class FillMask:
    """A whole model in one process, read from a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        self._predictor = Predictor.open(directory, "fill-mask")

    def best(self, text: str, num_words: int) -> list[list[tuple[str, float]]]:
        """For each [MASK] in ``text``, the likeliest words and their probabilities."""
        setup = replace(self._predictor.setup, options=Options(top=num_words))
        predictor = replace(self._predictor, setup=setup)
        (output,) = predictor.outputs(predictor.question(text.encode()).rows)
        words = words_of_masks(output, setup.encoder)
        return [[(word.token_str, word.score) for word in of_mask] for of_mask in words]
