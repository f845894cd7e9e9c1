"""Megatron-LM checkpoints as its own source writes them, from models of the real `transformers`.

Nothing here comes from the package: rows of query, key and value are put in order one by one.
"""

import random
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import MegatronBertConfig, MegatronBertForMaskedLM, MegatronBertForPreTraining

WORDS, PADDED, HIDDEN, HEADS, LAYERS, INNER, POSITIONS = 1000, 1024, 16, 4, 4, 24, 20
EPSILON = 1e-5
Model = MegatronBertForPreTraining | MegatronBertForMaskedLM


def build(*, binary: bool = True, seed: int = 3) -> Model:
    """Model in which every tensor is random; without a binary head it has no token types but a row of zeros."""
    config = MegatronBertConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS,
        type_vocab_size=2 if binary else 1,
        layer_norm_eps=EPSILON,
    )
    model = (MegatronBertForPreTraining if binary else MegatronBertForMaskedLM)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 4)
        if not binary:
            model.bert.embeddings.token_type_embeddings.weight.zero_()
    return model


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is written; ``version`` None leaves the key out, ``names`` are old, new, flat or core."""

    version: float | None = 3.0
    names: str = "new"
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    binary: bool = True
    shuffled: bool = False
    arguments: dict[str, object] | None = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)


def write(model: Model, kind: Kind, folder: Path, *, iteration: str = "release") -> Path:
    """Directory of Megatron-LM's layout, with its tracker file."""
    for rank in range(kind.tensor):
        for stage in range(kind.pipeline):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if kind.pipeline > 1 else "")
            (folder / iteration / name).mkdir(parents=True)
            torch.save(content(model, kind, rank, stage), folder / iteration / name / "model_optim_rng.pt")
    number = "release" if iteration == "release" else str(int(iteration.removeprefix("iter_")))
    (folder / "latest_checkpointed_iteration.txt").write_text(number)
    return folder


def content(model: Model, kind: Kind, rank: int, stage: int) -> dict[str, object]:
    """What one rank's file holds."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    chunks = [_chunk(state, kind, rank, stage, virtual) for virtual in range(kind.virtual)]
    if kind.shuffled:
        chunks = [_shuffled(chunk) for chunk in chunks]
    found: dict[str, object] = {"iteration": 7, **kind.extra}
    if kind.version is not None:
        found["checkpoint_version"] = kind.version
    if kind.arguments is not None:
        found["args"] = Namespace(**{**_arguments(kind), **kind.arguments})
    if kind.virtual > 1:
        found |= {f"model{number}": chunk for number, chunk in enumerate(chunks)}
    else:
        found["model"] = chunks[0]
    return found


def _arguments(kind: Kind) -> dict[str, object]:
    sizes = {"model_parallel_size": kind.tensor}
    if kind.version is not None and kind.version >= 3:
        sizes = {"tensor_model_parallel_size": kind.tensor, "pipeline_model_parallel_size": kind.pipeline}
    return {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "padded_vocab_size": PADDED,
        "tokenizer_type": "BertWordPieceLowerCase",
        "layernorm_epsilon": EPSILON,
        "ffn_hidden_size": INNER,
        **sizes,
    }


def _chunk(state: dict[str, Tensor], kind: Kind, rank: int, stage: int, virtual: int) -> dict[str, object]:
    """Layers of a (virtual) stage, and what the first and the last one have beside them."""
    share = LAYERS // (kind.pipeline * kind.virtual)
    first = (virtual * kind.pipeline + stage) * share
    is_first = stage == 0 and virtual == 0
    is_last = stage == kind.pipeline - 1 and virtual == kind.virtual - 1
    layers: dict[str, Tensor] = {}
    for local in range(share):
        layers |= _layer(state, kind, rank, first + local, f"layers.{local}")
    if is_last:
        layers |= _pair(state, "bert.encoder.ln", "final_layernorm")
    words = _cut(_padded(state["bert.embeddings.word_embeddings.weight"]), kind, rank)
    embedding = {"word_embeddings": {"weight": words}}
    embedding["position_embeddings"] = {"weight": state["bert.embeddings.position_embeddings.weight"]}
    if kind.binary:
        embedding["tokentype_embeddings"] = {"weight": state["bert.embeddings.token_type_embeddings.weight"]}
    head = {"bias": _cut(_padded(state["cls.predictions.bias"]), kind, rank)}
    head |= _pair(state, "cls.predictions.transform.dense", "dense")
    head |= _pair(state, "cls.predictions.transform.LayerNorm", "layernorm")
    pooler = _pair(state, "bert.pooler.dense", "dense") if kind.binary else {}
    binary = {
        key.removeprefix("x."): value for key, value in _pair(state, "cls.seq_relationship", "x").items()
    } if kind.binary else {}  # fmt: skip
    if kind.names == "core":
        return _core(layers, embedding, head, pooler, binary, is_first, is_last, words)
    if kind.names == "flat":
        return _flat(layers, embedding, head, pooler, binary)
    language: dict[str, object] = {"transformer" if kind.names == "old" else "encoder": layers}
    tree: dict[str, object] = {"language_model": language}
    if is_first:
        language["embedding"] = embedding
    if is_last:
        tree["lm_head"] = head
    if is_last and kind.binary:
        language["pooler"], tree["binary_head"] = pooler, binary
    if is_last and not is_first:
        tree["word_embeddings_for_head"] = {"weight": words}
    return tree


def _layer(state: dict[str, Tensor], kind: Kind, rank: int, number: int, name: str) -> dict[str, Tensor]:
    prefix = f"bert.encoder.layer.{number}"
    attention = f"{name}.attention" if kind.names in ("old", "flat") else f"{name}.self_attention"
    tensors: dict[str, Tensor] = {}
    for leaf in ("weight", "bias"):
        blocks = [state[f"{prefix}.attention.self.{block}.{leaf}"] for block in ("query", "key", "value")]
        tensors[f"{attention}.query_key_value.{leaf}"] = torch.stack(fused_rows(blocks, kind, rank))
    tensors |= _pair(state, f"{prefix}.attention.ln", f"{name}.input_layernorm")
    tensors |= _pair(state, f"{prefix}.attention.output.dense", f"{attention}.dense")
    tensors |= _pair(state, f"{prefix}.ln", f"{name}.post_attention_layernorm")
    tensors |= _pair(state, f"{prefix}.intermediate.dense", f"{name}.mlp.dense_h_to_4h")
    tensors |= _pair(state, f"{prefix}.output.dense", f"{name}.mlp.dense_4h_to_h")
    for part in (f"{attention}.dense.weight", f"{name}.mlp.dense_4h_to_h.weight"):
        tensors[part] = _cut(tensors[part], kind, rank, dim=1)
    for leaf in ("weight", "bias"):
        part = f"{name}.mlp.dense_h_to_4h.{leaf}"
        tensors[part] = _cut(tensors[part], kind, rank)
    return tensors


def fused_rows(blocks: Sequence[Tensor], kind: Kind, rank: int) -> list[Tensor]:
    """Rows of a rank's heads in the order of the checkpoint version."""
    size, share = HIDDEN // HEADS, HEADS // kind.tensor
    heads = range(rank * share, (rank + 1) * share)
    features = range(size)
    version = 3 if kind.names == "core" else kind.version or 0
    if version == 0:
        return [block[head * size + feature] for block in blocks for head in heads for feature in features]
    if version == 1:
        return [block[head * size + feature] for head in heads for feature in features for block in blocks]
    return [block[head * size + feature] for head in heads for block in blocks for feature in features]


def _pair(state: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.{leaf}": state[f"{source}.{leaf}"] for leaf in ("weight", "bias")}


def _cut(value: Tensor, kind: Kind, rank: int, dim: int = 0) -> Tensor:
    return value.chunk(kind.tensor, dim)[rank].clone()


def _padded(value: Tensor) -> Tensor:
    """With rows up to the padded number, which are ordinary numbers in Megatron-LM."""
    rows = torch.randn((PADDED - len(value), *value.shape[1:]), generator=torch.Generator().manual_seed(9))
    return torch.cat([value, rows.to(value.dtype)])


def _flat(layers: dict[str, Tensor], embedding: dict, head: dict, pooler: dict, binary: dict) -> dict[str, object]:
    """As before nested dictionaries: one flat language model."""
    flat = {f"{table}.weight": value["weight"] for table, value in embedding.items()}
    flat |= {f"transformer.{name}": value for name, value in layers.items()}
    flat |= {f"pooler.{name}": value for name, value in pooler.items()}
    return {"language_model": flat, "lm_head": head, **({"binary_head": binary} if binary else {})}


_CORE_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "post_attention_layernorm.": "mlp.linear_fc1.layer_norm_",
    "dense_h_to_4h": "linear_fc1",
    "dense_4h_to_h": "linear_fc2",
}


def _core(
    layers: dict[str, Tensor],
    embedding: dict,
    head: dict,
    pooler: dict,
    binary: dict,
    is_first: bool,
    is_last: bool,
    words: Tensor,
) -> dict[str, object]:
    """megatron-core with Transformer Engine's fused LayerNorms: one flat dictionary."""
    flat: dict[str, object] = {}
    for name, value in layers.items():
        for old, new in _CORE_NAMES.items():
            name = name.replace(old, new)
        flat[f"encoder.{name}"] = value
        flat[f"encoder.{name.rpartition('.')[0]}._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    if is_first:
        flat |= {f"embedding.{table}.weight": value["weight"] for table, value in embedding.items()}
    if is_last:
        flat |= {f"lm_head.{name.replace('layernorm', 'layer_norm')}": value for name, value in head.items()}
        flat["output_layer.bias"] = flat.pop("lm_head.bias")
        flat["output_layer._extra_state"] = None
        flat |= {f"pooler.{name}": value for name, value in pooler.items()}
        flat |= {f"binary_head.{name}": value for name, value in binary.items()}
    if is_last and not is_first:
        flat["output_layer.weight"] = words
    return flat


def _shuffled(tree: dict[str, object]) -> dict[str, object]:
    """The same at every depth, in another order."""
    items = [(key, _shuffled(value) if isinstance(value, dict) else value) for key, value in tree.items()]
    random.Random(4).shuffle(items)
    return dict(items)
