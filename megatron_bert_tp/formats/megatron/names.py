"""Names of a Megatron-LM checkpoint, and Hugging Face's names of the same tensors.

Query, key and value are one tensor there; it is called ``...attention.self.query_key_value`` here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

WORDS = "bert.embeddings.word_embeddings.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
BIAS = "cls.predictions.bias"
COPY = "cls.predictions.decoder.weight"
"""The last stage's own word embeddings, or the weight of megatron-core's output layer."""
FUSED = "attention.self.query_key_value"
BLOCKS = ("query", "key", "value")

LAYER_PARTS: Mapping[str, str] = {
    # Written; also read.
    "input_layernorm": "attention.ln",
    "self_attention.query_key_value": FUSED,
    "self_attention.dense": "attention.output.dense",
    "post_attention_layernorm": "ln",
    "mlp.dense_h_to_4h": "intermediate.dense",
    "mlp.dense_4h_to_h": "output.dense",
    # Until January 2021.
    "attention.query_key_value": FUSED,
    "attention.dense": "attention.output.dense",
    # megatron-core: first what all layer specifications share, then the local one, then Transformer Engine's.
    "self_attention.linear_qkv": FUSED,
    "self_attention.linear_proj": "attention.output.dense",
    "mlp.linear_fc1": "intermediate.dense",
    "mlp.linear_fc2": "output.dense",
    "pre_mlp_layernorm": "ln",
    "self_attention.linear_qkv.layer_norm": "attention.ln",
    "mlp.linear_fc1.layer_norm": "ln",
}
_OTHER_PARTS: Mapping[str, str] = {
    "word_embeddings": "bert.embeddings.word_embeddings",
    "position_embeddings": "bert.embeddings.position_embeddings",
    "tokentype_embeddings": "bert.embeddings.token_type_embeddings",
    "final_layernorm": "bert.encoder.ln",
    "pooler.dense": "bert.pooler.dense",
    "lm_head": "cls.predictions",
    "lm_head.dense": "cls.predictions.transform.dense",
    "lm_head.layernorm": "cls.predictions.transform.LayerNorm",
    "lm_head.layer_norm": "cls.predictions.transform.LayerNorm",
    "output_layer": "cls.predictions",
    "binary_head": "cls.seq_relationship",
}
_COPIES = ("word_embeddings_for_head.weight", "output_layer.weight")
# Files before nested dictionaries, and wrapped models, carry any of these before the names.
_HOLDERS = re.compile(r"(?:(?:module|model|language_model|embedding|encoder|transformer)\.)+")
_LAYER = re.compile(r"layers\.(\d{1,5})\.(.+)")
_FUSED_NORM = re.compile(r"\.layer_norm_(weight|bias)$")
_CORE = re.compile(r"\.linear_qkv\.(?:weight|bias)$")
_SPLIT: Mapping[str, int] = {
    "word_embeddings.weight": 0,
    "cls.predictions.bias": 0,
    "cls.predictions.decoder.weight": 0,
    "query_key_value.weight": 0,
    "query_key_value.bias": 0,
    "intermediate.dense.weight": 0,
    "intermediate.dense.bias": 0,
    "output.dense.weight": 1,
}


@dataclass(frozen=True)
class LocalName:
    """Name of a tensor in which layers count from the first of its stage; ``layer`` None outside of layers."""

    layer: int | None
    rest: str

    def counted_from(self, first_layer: int) -> str:
        """Name in the whole model."""
        return self.rest if self.layer is None else f"bert.encoder.layer.{self.layer + first_layer}.{self.rest}"


def read_name(key: str) -> LocalName | None:
    """Hugging Face's name for a dotted name of Megatron-LM of any age; None when it is not of a BERT."""
    short = key[holder.end() :] if (holder := _HOLDERS.match(key)) else key
    if short in _COPIES:
        return LocalName(None, COPY)
    layer = _LAYER.fullmatch(short)
    parts, rest = (LAYER_PARTS, layer[2]) if layer else (_OTHER_PARTS, short)
    part, _, leaf = _FUSED_NORM.sub(r".layer_norm.\1", rest).rpartition(".")
    if part not in parts or leaf not in ("weight", "bias"):
        return None
    return LocalName(int(layer[1]) if layer else None, f"{parts[part]}.{leaf}")


def is_core(key: str) -> bool:
    """Whether a name is one of megatron-core, whose row order no version number tells."""
    return _CORE.search(key) is not None


def split_dim(name: str) -> int | None:
    """Dimension over which the tensor ranks share a tensor; None where each has all of it."""
    return next((dim for suffix, dim in _SPLIT.items() if name.endswith(f".{suffix}") or name == suffix), None)
