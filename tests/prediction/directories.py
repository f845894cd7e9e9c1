"""Models with tokenizers on disk, and predictors on them without the command line around."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

import megatron_bert_tp
from megatron_bert_tp import MegatronBertConfig
from megatron_bert_tp.formats.tokenizer_files import write_tokenizer
from megatron_bert_tp.prediction.arguments import Options
from megatron_bert_tp.prediction.predictor import Predictor
from megatron_bert_tp.prediction.stream import answered_windows, lines_of

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 160,
    "type_vocab_size": 2,
    # Far above what training starts with, so that answers differ clearly.
    "initializer_range": 0.4,
}
ENTITIES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "NUMBER", "x-y-z"]


def named(*labels: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels))}


def make_directory(folder: Path, architecture: str, vocabulary: Path, *, lowercase: bool, **settings: Any) -> Path:
    """Hugging Face directory of a random model, by our own `save_pretrained` and `write_tokenizer`."""
    vocab_size = len(vocabulary.read_text(encoding="utf-8").splitlines())
    # Three words more than the tokenizer has: files of Megatron-LM have padded vocabularies.
    config = MegatronBertConfig(**{"vocab_size": vocab_size + 3, **SIZES, **settings})
    model = getattr(megatron_bert_tp, architecture)(config, seed=3)
    draws = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3, generator=draws)
    model.save_pretrained(folder)
    add_tokenizer(folder, vocabulary, lowercase=lowercase, longest=config.max_position_embeddings)
    return folder


def add_tokenizer(folder: Path, vocabulary: Path, *, lowercase: bool, longest: int) -> None:
    write_tokenizer(folder, {"vocab.txt": vocabulary}, lowercase=lowercase, longest=longest)


def answers(predictor: Predictor, lines: list[str | dict[str, Any]], *, window: int = 100) -> list[Any]:
    """Records as they are written and read again."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    source = BytesIO("".join(f"{text}\n" for text in texts).encode())
    found = answered_windows(predictor, lines_of(source), size=window)
    return json.loads(json.dumps([record for records in found for record in records]))


def predict(directory: Path, task: str, lines: list[Any], *, batch_size: int = 4, **options: Any) -> list[Any]:
    return answers(Predictor.open(directory, task, options=Options(**options), batch_size=batch_size), lines)
