"""Encoders under test, and the tokenizers of transformers with the same vocabulary."""

from pathlib import Path

from transformers import BertTokenizerFast

from megatron_bert_tp.formats.weights import ModelSource
from megatron_bert_tp.model.shape import PRETRAINING, ModelShape
from megatron_bert_tp.text.encoder import TextEncoder, open_encoder
from tests.prediction.texts import VOCABULARIES
from tests.sources import real_data

TINY = ("uncased", "cased")
REAL = {"bert uncased": "bert-large-uncased-vocab.txt", "bert cased": "bert-large-cased-vocab.txt"}
ALL = (*TINY, *REAL)


def entries_of(name: str) -> list[str]:
    """Vocabulary by name; the test is skipped where it is a real one that is not there."""
    if name in TINY:
        return VOCABULARIES[name]
    return real_data(f"vocab/{REAL[name]}").read_text(encoding="utf-8").splitlines()


def encoder_of(name: str, folder: Path, *, longest: int = 512, num_types: int = 2) -> TextEncoder:
    """The encoder of a model with this vocabulary; its ``vocab.txt`` is written to ``folder``."""
    path = folder / "vocab.txt"
    entries = entries_of(name)
    path.write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")
    shape = ModelShape(
        vocab_size=len(entries),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=longest,
        type_vocab_size=num_types,
    )
    source = ModelSource(shape, PRETRAINING, _no_weights, {path.name: path}, lowercase="uncased" in name)
    return open_encoder(source, folder)


def reference_of(name: str) -> BertTokenizerFast:
    """What transformers makes of the same vocabulary."""
    ids = {entry: number for number, entry in enumerate(entries_of(name))}
    return BertTokenizerFast(vocab=ids, do_lower_case="uncased" in name, model_max_length=512)


def _no_weights(*_: object) -> None:
    raise AssertionError("a tokenizer needs no weights")
