"""Models that the real `transformers` wrote: the independent truth of these tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import MegatronBertConfig, PreTrainedModel
from transformers.utils import logging

from megatron_bert_tp.model.shape import ModelShape

ODD = ModelShape(
    vocab_size=1003,
    hidden_size=16,
    num_hidden_layers=5,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=20,
    type_vocab_size=3,
    hidden_dropout_prob=0.25,
    attention_probs_dropout_prob=0.125,
    layer_norm_eps=1e-7,
    initializer_range=0.03,
)

logging.disable_progress_bar()
logging.set_verbosity_error()


def build(
    architecture: str = "MegatronBertForPreTraining",
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    **settings: object,
) -> PreTrainedModel:
    """Model of `transformers` in which every tensor is random, biases and LayerNorms too."""
    written = {k: v for k, v in vars(ODD).items() if k not in ("num_labels", "position_embedding_type")}
    numbers = {**written, "tie_word_embeddings": tied, **settings}
    model = getattr(transformers, architecture)(MegatronBertConfig(**numbers)).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
        if not tied and hasattr(model, "cls") and hasattr(model.cls, "predictions"):
            # transformers 4 ties the two biases in any case, 5 leaves the first one idle
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
    return model


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """Function that saves such a model and returns the directory; ``shards`` cuts it into many files."""

    def save(name: str = "original", *, shards: bool = False, **settings: object) -> Path:
        limit = {"max_shard_size": "20KB"} if shards else {}
        build(**settings).save_pretrained(tmp_path / name, **limit)
        return tmp_path / name

    return save


def settings_of(directory: Path) -> dict[str, object]:
    """A config.json without the version of the program that wrote it."""
    values = json.loads((directory / "config.json").read_text())
    return {name: value for name, value in values.items() if name != "transformers_version"}


def save_pickled(directory: Path, *, shards: int = 1, legacy: bool = False, **extra: torch.Tensor) -> None:
    """Put the weights of a model of `transformers` into .bin files, tied copies included, in place of its own."""
    model = getattr(transformers, settings_of(directory)["architectures"][0]).from_pretrained(directory)
    state = {**model.state_dict(), **extra}
    for path in directory.glob("*.safetensors"):
        path.unlink()
    kind = {"_use_new_zipfile_serialization": not legacy}
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin", **kind)
        return
    weight_map = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(state.items())[number::shards])
        torch.save(part, directory / name, **kind)
        weight_map |= dict.fromkeys(part, name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, read by the safetensors library."""
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_same_bytes(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value.view(torch.uint8), second[name].view(torch.uint8)), name
