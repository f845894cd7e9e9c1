"""Where the weights of a model come from and go to: Hugging Face directories, and checkpoints to read."""

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.checkpoint.read import Reader
from megatron_bert_tp.errors import ConfigError, FormatError, MegatronBertError
from megatron_bert_tp.family.config import MegatronBertConfig
from megatron_bert_tp.formats.arguments import num_bytes
from megatron_bert_tp.formats.classes import is_of_a_head
from megatron_bert_tp.formats.huggingface_config import CONFIG
from megatron_bert_tp.formats.huggingface_writer import write_directory
from megatron_bert_tp.formats.number_formats import dtype_of
from megatron_bert_tp.formats.stored_tensors import INDEX, PICKLED, PICKLED_INDEX, WEIGHTS
from megatron_bert_tp.formats.weights import ModelSource
from megatron_bert_tp.model.initialisation import initial_tensor
from megatron_bert_tp.model.shape import Head, ModelShape, tensor_shapes
from megatron_bert_tp.parallel.collectives import gather_over
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.sharding import Part

MODEL_FILES = (CONFIG, WEIGHTS, INDEX, PICKLED, PICKLED_INDEX)
WORDS = "bert.embeddings.word_embeddings.weight"


_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def dtype_named(dtype: torch.dtype | str) -> torch.dtype:
    """A number format, given as such or by name; ConfigError for one that no model has."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"dtype is {dtype}, which is no number format of a model; choose {', '.join(_DTYPES)}")
    return _DTYPES[name]


def shard_bytes(size: int | str) -> int:
    """Bytes of a file at most, from a number or text such as ``5GB``; ConfigError when it is no size."""
    try:
        found = num_bytes(size) if isinstance(size, str) else size
    except ArgumentTypeError as error:
        raise ConfigError(f"max_shard_size: {error}") from error
    if found < 1:
        raise ConfigError(f"max_shard_size is {size}; it must be a number of bytes above 0, or text such as 5GB")
    return found


@dataclass(frozen=True)
class Pretrained:
    """A source of weights for a model of some class.

    ``new`` tensors are not in the files and drawn from the seed; ``unused`` ones are in the files only.
    """

    config: MegatronBertConfig
    read: Reader
    dtype: torch.dtype
    new: tuple[str, ...]
    unused: tuple[str, ...]


def open_pretrained(
    path: Path, head: Head, overrides: Mapping[str, object], *, seed: int, ignores_sizes: bool
) -> Pretrained:
    """Weights for a model with ``head`` from a Hugging Face directory or a checkpoint of any class.

    ``overrides`` are settings over those of the files.  FormatError or CheckpointError when the files are no
    MegatronBert; ConfigError when tensors of the encoder are missing or too many, or tensors have other sizes
    than the settings say; those of a head are new instead with ``ignores_sizes``.
    """
    source = ModelSource.open(path)
    config = MegatronBertConfig.from_shape(source.shape, source.settings).replaced(**overrides)
    wanted, found = tensor_shapes(config.shape, head), tensor_shapes(source.shape, source.head)
    other = [name for name in wanted if name in found and wanted[name] != found[name]]
    fixed = [name for name in other if not (ignores_sizes and _may_be_new(name))]
    if fixed:
        raise ConfigError(_misfits(path, fixed, wanted, found))
    _check_encoder(path, config.shape, source.shape)
    new = [name for name in wanted if name not in found or name in other]
    lacking = [name for name in new if name not in other and not _may_be_new(name)]
    if lacking:
        raise ConfigError(f"{path}: has no {lacking[0]} ({len(lacking)} such tensors); its model is another one")
    read = _filling(source.read, new, wanted, seed=seed, deviation=config.initializer_range)
    return Pretrained(
        config,
        read,
        dtype_of(source.read, WORDS, found[WORDS]),
        new=tuple(new),
        unused=tuple(name for name in found if name not in wanted),
    )


def _check_encoder(path: Path, wanted: ModelShape, found: ModelShape) -> None:
    """ConfigError for settings that would use the weights in another way than they were trained for."""
    for name in ("num_hidden_layers", "num_attention_heads"):
        here, there = getattr(wanted, name), getattr(found, name)
        if here != there:
            raise ConfigError(
                f"{path}: its model has {name} {there}, and {here} was asked for; leave that out, since the "
                "weights would not be those of a trained model"
            )


def _may_be_new(name: str) -> bool:
    """What is trained on top of an encoder: heads, cross-attention and distances."""
    return is_of_a_head(name) or ".crossattention." in name or ".distance_embedding." in name


def _misfits(
    path: Path, names: Sequence[str], wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    lines = [f"  {name}: {found[name]} there, {wanted[name]} asked for" for name in names[:10]]
    more = [f"  and {len(names) - 10} more"] if len(names) > 10 else []
    title = f"{path}: tensors have other sizes than the settings that were given:"
    way_out = "leave these settings out; a head of another size is drawn anew with ignore_mismatched_sizes=True"
    return "\n".join([title, *lines, *more, way_out])


def _filling(
    read: Reader, new: Sequence[str], shapes: Mapping[str, tuple[int, ...]], *, seed: int, deviation: float
) -> Reader:
    """Reader that draws the tensors ``new`` from the seed."""
    drawn = set(new)

    def filled(name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        if name not in drawn:
            return read(name, offsets, extent)
        whole = initial_tensor(name, shapes[name], seed=seed, deviation=deviation)
        return whole[tuple(slice(o, o + e) for o, e in zip(offsets, extent, strict=True))]

    return filled


def whole_tensors(parts: Sequence[Part], axis: Axis) -> dict[str, Tensor]:
    """Whole tensors by name on the first rank of ``axis``, on the CPU; the others get nothing.

    Every rank must call it; tied copies are left out.
    """
    wholes = {}
    for part in parts:
        if part.alias_of is None:
            whole = gather_whole(part, axis)
            if axis.is_first:
                wholes[part.name] = whole.cpu()
    return wholes


def gather_whole(part: Part, axis: Axis) -> Tensor:
    """Whole tensor of a part on every rank of ``axis``, all of which must call it."""
    values = part.parameter.detach()
    if part.dim is None:
        return part.view(values)
    is_even = part.local_shape[part.dim] * axis.size == part.shape[part.dim]
    joined = gather_over(part.view(values) if is_even else values, axis, dim=part.dim)
    return joined.narrow(part.dim, 0, part.shape[part.dim])


def reader_of(wholes: Mapping[str, Tensor]) -> Reader:
    """Whole tensors as a source of rectangles."""

    def read(name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        return wholes[name][tuple(slice(o, o + e) for o, e in zip(offsets, extent, strict=True))]

    return read


def write_pretrained(
    directory: Path,
    config: MegatronBertConfig,
    head: Head,
    wholes: Mapping[str, Tensor],
    *,
    max_shard_bytes: int | None,
) -> None:
    """Write config.json and weights beside what stands in ``directory``, such as a tokenizer.

    FormatError when a file of that name is there already: nothing is overwritten.
    """
    temporary = directory.absolute().with_name(f"{directory.absolute().name}.saving")
    write_directory(
        temporary,
        config.shape,
        reader_of(wholes),
        {},
        head=head,
        settings=config.settings,
        max_shard_bytes=max_shard_bytes,
    )
    written = sorted(temporary.iterdir())
    directory.mkdir(parents=True, exist_ok=True)
    taken = sorted(name for name in MODEL_FILES if (directory / name).exists())
    taken += [path.name for path in written if (directory / path.name).exists()]
    for path in written:
        path.unlink() if taken else path.rename(directory / path.name)
    temporary.rmdir()
    if taken:
        raise FormatError(f"{directory / taken[0]}: exists already; remove the model there, or give another name")


def check_sizes(parts: Sequence[Part], config: MegatronBertConfig, head: Head) -> None:
    """ConfigError when the settings were changed to those of another model after this one was built."""
    wanted = tensor_shapes(config.shape, head)
    for part in parts:
        if part.alias_of is None and wanted.get(part.name) != part.shape:
            raise ConfigError(
                f"{part.name} has the shape {part.shape}, but the settings say {wanted.get(part.name)} by now; "
                "set config back to the numbers of the model, or build a new one"
            )


def agreed(failure: MegatronBertError | OSError | None, axis: Axis) -> None:
    """Raise on every rank of ``axis`` what the first one failed with; every rank must call it."""
    if failure is not None and axis.size == 1:
        raise failure
    if axis.size == 1:
        return
    told = [None if failure is None else str(failure)]
    dist.broadcast_object_list(told, src=axis.ranks[0], group=axis.group)
    if told[0] is not None:
        raise failure or FormatError(told[0])
