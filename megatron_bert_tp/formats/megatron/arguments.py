"""What the arguments of a Megatron-LM training say about the model, and what is assumed where they are silent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.checkpoint.model import parse_shape
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.megatron.isolated import RankContent
from megatron_bert_tp.model.shape import ACTIVATIONS, ModelShape

LOGICAL_ROWS = "logical_vocab_size"
"""Argument, of our own files alone, for the number of rows that are no padding."""
MEGATRON_EPSILON, HUGGINGFACE_EPSILON = 1e-5, 1e-12
_HEAD_SIZE = 64  # of BERT, and of every size that NVIDIA published
_DROPOUT = 0.1
# Arguments that change what the model computes, with the values under which it is a MegatronBert.
_ONLY: Mapping[str, tuple[JSON, ...]] = {
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "group_query_attention": (False,),
    "normalization": ("LayerNorm",),
    "num_experts": (0,),
    "position_embedding_type": ("learned_absolute", "absolute"),
    "squared_relu": (False,),
    "swiglu": (False,),
    "untie_embeddings_and_output_weights": (False,),
    "use_rotary_position_embeddings": (False,),
}
_TENSOR_SIZES = ("tensor_model_parallel_size", "model_parallel_size")
_PIPELINE_SIZE = "pipeline_model_parallel_size"
_LOWERCASE = {"BertWordPieceLowerCase": True, "BertWordPieceCase": False}

_READ = {
    *_ONLY,
    *_TENSOR_SIZES,
    _PIPELINE_SIZE,
    LOGICAL_ROWS,
    *("padded_vocab_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "kv_channels"),
    *("max_position_embeddings", "layernorm_epsilon", "norm_epsilon", "openai_gelu", "bias_gelu_fusion"),
    *("hidden_dropout", "attention_dropout", "init_method_std", "tokenizer_type"),
}

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model by its tensors; ``rows`` with padding, ``types`` 0 without token-type embeddings."""

    rows: int
    hidden: int
    layers: int
    intermediate: int
    positions: int
    types: int


@dataclass(frozen=True)
class Wishes:
    """What the user decides instead of the file; None leaves it to the file."""

    vocab_size: int | None = None
    huggingface_epsilon: bool = False
    hidden_act: str | None = None
    num_attention_heads: int | None = None


def agreed_arguments(ranks: Sequence[RankContent]) -> dict[str, JSON]:
    """The arguments that are read here; FormatError unless all files have the same ones, and the same version."""
    first, *others = ranks
    wanted = {name: value for name, value in first.arguments.items() if name in _READ}
    for other in others:
        theirs = {name: value for name, value in other.arguments.items() if name in _READ}
        names = sorted(name for name in {*wanted, *theirs} if wanted.get(name) != theirs.get(name))
        if names or first.version != other.version:
            raise FormatError(
                f"{other.label}: differs from {first.label} in {', '.join(names) or 'checkpoint_version'}; these "
                "files are not of one checkpoint"
            )
    return wanted


def check_arguments(arguments: Mapping[str, JSON], *, tensor: int, pipeline: int, source: str) -> None:
    """FormatError unless the model is a MegatronBert, and the files are all of its ``tensor x pipeline`` ranks."""
    lines = [
        f"  {name} is {arguments[name]!r}" + (f"; only {values[0]!r} can be read" if values else "")
        for name, values in _ONLY.items()
        if name in arguments and arguments[name] not in values
    ]
    if lines:
        raise FormatError("\n".join([f"{source}: its arguments are not those of a MegatronBert:", *lines]))
    said_tensor = next((arguments[name] for name in _TENSOR_SIZES if name in arguments), tensor)
    said = (said_tensor, arguments.get(_PIPELINE_SIZE, pipeline))
    if said != (tensor, pipeline):
        raise FormatError(
            f"{source}: its arguments say {said[0]} x {said[1]} ranks (tensor x pipeline), but there are files of "
            f"{tensor} x {pipeline}; give the directory that holds all mp_rank folders"
        )


def padded_shape(
    arguments: Mapping[str, JSON], found: Sizes, wishes: Wishes, tell: Tell, *, source: str
) -> ModelShape:
    """The model with all rows of the file; arguments go before the sizes that were ``found``.

    FormatError when a number is impossible.
    """
    hidden = arguments.get("hidden_size", found.hidden)
    values: dict[str, JSON] = {
        "vocab_size": arguments.get("padded_vocab_size", found.rows),
        "hidden_size": hidden,
        "num_hidden_layers": arguments.get("num_layers", found.layers),
        "num_attention_heads": _num_heads(arguments, hidden, wishes, tell),
        "intermediate_size": arguments.get("ffn_hidden_size", found.intermediate),
        "max_position_embeddings": arguments.get("max_position_embeddings", found.positions),
        "type_vocab_size": max(1, found.types),
        "layer_norm_eps": _epsilon(arguments, wishes, tell),
        "hidden_act": _activation(arguments, wishes, tell),
        "hidden_dropout_prob": arguments.get("hidden_dropout", _DROPOUT),
        "attention_probs_dropout_prob": arguments.get("attention_dropout", _DROPOUT),
        "initializer_range": arguments.get("init_method_std", 0.02),
    }
    shape = parse_shape(values, source=source, error=FormatError)
    kv_channels = arguments.get("kv_channels", shape.head_size)
    if kv_channels != shape.head_size:
        raise FormatError(
            f"{source}: kv_channels is {kv_channels!r}, but must be hidden_size / num_attention_heads = "
            f"{shape.head_size}; other head sizes do not exist in a MegatronBert"
        )
    return shape


def logical_rows(arguments: Mapping[str, JSON], rows: int, wishes: Wishes, tell: Tell, *, source: str) -> int:
    """Rows that become the vocabulary: as wished, as recorded, or all; FormatError when there are fewer."""
    wanted = arguments.get(LOGICAL_ROWS, rows) if wishes.vocab_size is None else wishes.vocab_size
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= rows:
        raise FormatError(f"{source}: a vocabulary of {wanted!r} is impossible; the file has {rows} rows")
    reason = "the file's rows, padding included" if wanted == rows else f"of {rows} rows in the file"
    tell(f"vocab_size {wanted}: {reason}")
    return wanted


def is_lowercase(arguments: Mapping[str, JSON]) -> bool | None:
    """Whether the training's tokenizer was uncased; None where the arguments do not say."""
    kind = arguments.get("tokenizer_type")
    return _LOWERCASE.get(kind) if isinstance(kind, str) else None


def _num_heads(arguments: Mapping[str, JSON], hidden: JSON, wishes: Wishes, tell: Tell) -> JSON:
    if wishes.num_attention_heads is not None:
        return wishes.num_attention_heads
    if "num_attention_heads" in arguments or not isinstance(hidden, int):
        return arguments.get("num_attention_heads")
    heads = max(1, hidden // _HEAD_SIZE)
    tell(f"num_attention_heads {heads}: assumed, {_HEAD_SIZE} features each, for the file does not say it")
    return heads


def _epsilon(arguments: Mapping[str, JSON], wishes: Wishes, tell: Tell) -> JSON:
    recorded = next((name for name in ("layernorm_epsilon", "norm_epsilon") if name in arguments), None)
    value: JSON
    if wishes.huggingface_epsilon:
        value, reason = HUGGINGFACE_EPSILON, "as asked for, like Hugging Face's converter"
    elif recorded is not None:
        value, reason = arguments[recorded], f"{recorded} of the file"
    else:
        value, reason = MEGATRON_EPSILON, "the default of Megatron-LM, for the file does not say it"
    tell(f"layer_norm_eps {value}: {reason}")
    return value


def _activation(arguments: Mapping[str, JSON], wishes: Wishes, tell: Tell) -> str:
    """``gelu`` with the error function, or ``gelu_new`` with tanh, and why."""
    if wishes.hidden_act is not None:
        if wishes.hidden_act not in ACTIVATIONS:
            raise FormatError(f"hidden_act {wishes.hidden_act!r} is unknown; known are {', '.join(ACTIVATIONS)}")
        name, reason = wishes.hidden_act, "as asked for"
    elif arguments.get("openai_gelu") is True:
        name, reason = "gelu_new", "openai_gelu is set in the file"
    elif arguments.get("bias_gelu_fusion") is True:
        name, reason = "gelu_new", "bias_gelu_fusion is set in the file; its LM head alone used gelu"
    elif "bias_gelu_fusion" in arguments:
        name, reason = "gelu", "bias_gelu_fusion is off in the file"
    else:
        name, reason = "gelu", "the file sets neither openai_gelu nor bias_gelu_fusion"
    tell(f"hidden_act {name}: {reason}")
    return name
