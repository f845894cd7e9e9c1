"""`config.json` of a Hugging Face directory: to a `ModelShape`, a class and what is left, and back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from megatron_bert_tp.checkpoint.durable import JSON, read_object
from megatron_bert_tp.checkpoint.model import parse_shape
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.model.shape import HEADS, Head, ModelShape

CONFIG = "config.json"
LABELS = ("id2label", "label2id")
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
_SAME_ACTIVATION = {"swish": "silu"}
_NUM_LABELS = 2  # where a file says nothing
_WRITTEN = {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version"}
_OF_THE_MODEL = {each.name for each in fields(ModelShape)} | _WRITTEN


@dataclass(frozen=True)
class HuggingFaceConfig:
    """What a `config.json` says; ``settings`` are the keys that neither the shape nor the class holds."""

    shape: ModelShape
    head: Head | None
    """The class that it names, if it names one."""
    settings: Mapping[str, JSON] = field(default_factory=dict)


def read_config(path: Path) -> HuggingFaceConfig:
    """Model that a `config.json` describes; FormatError when it is no MegatronBert, or one that cannot be."""
    values = read_object(path, largest=_LARGEST, error=FormatError)
    if values.get("model_type") != "megatron-bert":
        raise FormatError(
            f"{path}: model_type is {values.get('model_type')!r}; only 'megatron-bert' can be read "
            "(BERT itself has its LayerNorms elsewhere, so its weights do not fit)"
        )
    if values.get("pad_token_id", 0) is None:
        raise FormatError(
            f"{path}: pad_token_id is null, but it must be a number, since the row of [PAD] gets no gradient; "
            "write the row of [PAD] there (0 in the vocabularies of BERT)"
        )
    values["hidden_act"] = _activation(values)
    _check_names(path, values.get("id2label"))
    shape = parse_shape(
        {**_DEFAULTS, **values, "num_labels": _num_labels(values)}, source=str(path), error=FormatError
    )
    settings = {name: value for name, value in values.items() if name not in _OF_THE_MODEL}
    return HuggingFaceConfig(shape, _head(path, values), settings)


def config_of(
    shape: ModelShape, head: Head, dtype: str, settings: Mapping[str, JSON] | None = None
) -> dict[str, JSON]:
    """Content of a `config.json`, as `save_pretrained` writes it; ``dtype`` such as ``float32``.

    ``settings`` are further keys; those that say the shape or the class anew do not count.
    FormatError when they name the labels of another number of classes.
    """
    kept = {name: value for name, value in (settings or {}).items() if name not in _OF_THE_MODEL}
    _check_labels(kept, shape)
    numbers = {name: value for name, value in asdict(shape).items() if name != "num_labels"}
    if not shape.is_relative:
        del numbers["position_embedding_type"]
    return {
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        **_labels(shape.num_labels),
        **kept,
        "architectures": [head.architecture],
        "model_type": "megatron-bert",
        "dtype": dtype,
        **numbers,
    }


def _check_names(path: Path, labels: JSON) -> None:
    """FormatError unless the classes are numbered from 0 on, and their names are text."""
    if labels is None:
        return
    if not isinstance(labels, Mapping):
        raise FormatError(f"{path}: id2label must be an object of names by number, not a {type(labels).__name__}")
    numbers = {str(number) for number in range(len(labels))}
    wrong = [key for key in labels if key not in numbers]
    if wrong:
        raise FormatError(
            f"{path}: id2label has the key {wrong[0]!r}; its {len(labels)} keys must be the whole numbers 0 to "
            f"{len(labels) - 1}"
        )
    for key, name in labels.items():
        if not isinstance(name, str):
            raise FormatError(f"{path}: id2label names {key} {name!r}; the name of a class must be text")


def _activation(values: Mapping[str, JSON]) -> JSON:
    name = values.get("hidden_act", "gelu")
    return _SAME_ACTIVATION.get(name, name) if isinstance(name, str) else name


def _num_labels(values: Mapping[str, JSON]) -> JSON:
    labels = values.get("id2label")
    return len(labels) if isinstance(labels, Mapping) and labels else values.get("num_labels", _NUM_LABELS)


def _head(path: Path, values: Mapping[str, JSON]) -> Head | None:
    named = values.get("architectures")
    if not named:
        return None
    name = named[0] if isinstance(named, list) else named
    if not isinstance(name, str) or name not in HEADS:
        raise FormatError(
            f"{path}: architectures names the class {name!r}; write one of {', '.join(HEADS)} there, or remove "
            "the entry to have the class judged from the tensors"
        )
    return HEADS[name]


def _labels(num_labels: int) -> dict[str, JSON]:
    """Names of the classes, as `transformers` makes them up; two need none."""
    if num_labels == _NUM_LABELS:
        return {}
    names = [f"LABEL_{number}" for number in range(num_labels)]
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _check_labels(settings: Mapping[str, JSON], shape: ModelShape) -> None:
    labels = settings.get("id2label")
    if isinstance(labels, Mapping) and labels and len(labels) != shape.num_labels:
        raise FormatError(
            f"id2label names {len(labels)} classes, but the model has num_labels {shape.num_labels}; give as many "
            "names as classes, or none"
        )
