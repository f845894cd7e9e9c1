"""`config.json` of a Hugging Face directory: to a `ModelShape` and back."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megatron_bert_tp.checkpoint.durable import JSON, read_object
from megatron_bert_tp.checkpoint.model import parse_shape
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.model.shape import ModelShape

CONFIG = "config.json"
ARCHITECTURE = "MegatronBertForPreTraining"
_LARGEST = 2**20  # bytes
_DEFAULTS: Mapping[str, JSON] = {
    # What `transformers.MegatronBertConfig` takes where a file leaves a number out.
    "vocab_size": 29056,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}
_OMITTED = ("num_labels", "position_embedding_type")  # the first is id2label's length, the second is the default
_ONLY: Mapping[str, JSON] = {
    # Settings that change what the model computes, and the one value that is supported.
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def read_config(path: Path) -> ModelShape:
    """Model that a `config.json` describes; FormatError when it is no MegatronBert or needs what is not here."""
    values = read_object(path, largest=_LARGEST, error=FormatError)
    if values.get("model_type") != "megatron-bert":
        raise FormatError(
            f"{path}: model_type is {values.get('model_type')!r}; only 'megatron-bert' can be read "
            "(BERT itself has its LayerNorms elsewhere, so its weights do not fit)"
        )
    problems = [
        f"  {name} is {values[name]!r}; only {value!r} is supported"
        for name, value in _ONLY.items()
        if values.get(name, value) != value
    ]
    if problems:
        raise FormatError("\n".join([f"{path}: this kind of MegatronBert cannot be read:", *problems]))
    return parse_shape({**_DEFAULTS, **values}, source=str(path), error=FormatError)


def config_of(shape: ModelShape, dtype: str) -> dict[str, JSON]:
    """Content of a `config.json`, as `save_pretrained` writes it; ``dtype`` such as ``float32``."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "megatron-bert",
        "dtype": dtype,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        **{name: value for name, value in asdict(shape).items() if name not in _OMITTED},
    }
