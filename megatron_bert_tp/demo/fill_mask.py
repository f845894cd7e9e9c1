"""Words for the [MASK]s of a sentence, from exported weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.load import load_parts_
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from megatron_bert_tp.model.stage import MegatronBertStage, PretrainingLogits
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.pipeline.partition import partition

MASK = "[MASK]"


@dataclass(frozen=True)
class Sentence:
    """One sentence as a stage reads it."""

    input_ids: Tensor
    token_type_ids: Tensor
    masked_positions: Tensor
    attention_mask: Tensor | None = None
    sample_numbers: tuple[int, ...] = (0,)


class FillMask:
    """A whole model in one process, read from a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        weights = HuggingFaceDirectory.open(directory)
        plan = partition(weights.shape.num_hidden_layers, 1)[0]
        self._stage = MegatronBertStage(weights.shape, plan, axis=Axis.alone("tensor")).eval()
        load_parts_(self._stage.parts(), weights.read)
        self._tokenizer = Tokenizer.load(directory / "tokenizer.json", lowercase=True)  # it says the case itself

    def best(self, text: str, num_words: int) -> list[list[tuple[str, float]]]:
        """For each [MASK] in ``text``, the likeliest words and their probabilities."""
        sentence = self._read(text)
        with torch.no_grad():
            output = self._stage(None, sentence)
        assert isinstance(output, PretrainingLogits)
        logits = output.masked[:, : self._stage.shape.vocab_size]
        probabilities, ids = logits.softmax(-1).topk(num_words)
        words = [self._tokenizer.tokens(row) for row in ids.tolist()]
        return [list(zip(*pair, strict=True)) for pair in zip(words, probabilities.tolist(), strict=True)]

    def _read(self, text: str) -> Sentence:
        vocabulary = self._tokenizer.vocabulary
        pieces = self._tokenizer.encode_batch(text.split(MASK))
        ids = [vocabulary.cls_id, *pieces[0]]
        for piece in pieces[1:]:
            ids += [vocabulary.mask_id, *piece]
        input_ids = torch.tensor([[*ids, vocabulary.sep_id]])
        masked = (input_ids.flatten() == vocabulary.mask_id).nonzero().flatten()
        return Sentence(input_ids, torch.zeros_like(input_ids), masked)
