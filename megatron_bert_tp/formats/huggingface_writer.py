"""Writing a Hugging Face directory of any of the nine classes, as `save_pretrained` would, tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch

from megatron_bert_tp.checkpoint.durable import JSON, no_room, sync
from megatron_bert_tp.checkpoint.read import Reader
from megatron_bert_tp.checkpoint.tensor_file import Content, read_in_blocks, write_tensor_file
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.classes import name_in_file
from megatron_bert_tp.formats.huggingface import BIAS, DECODER_BIAS
from megatron_bert_tp.formats.huggingface_config import CONFIG, config_of
from megatron_bert_tp.formats.number_formats import converting, dtype_of
from megatron_bert_tp.formats.stored_tensors import INDEX, WEIGHTS
from megatron_bert_tp.formats.tokenizer_files import write_tokenizer
from megatron_bert_tp.formats.work_folder import check_free, work_folder
from megatron_bert_tp.model.shape import PRETRAINING, Head, ModelShape, tensor_shapes

CARD = "README.md"
_METADATA = {"format": "pt"}


def write_directory(
    out: Path,
    shape: ModelShape,
    read: Reader,
    tokenizer_files: Mapping[str, Path],
    *,
    head: Head = PRETRAINING,
    lowercase: bool | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    settings: Mapping[str, JSON] | None = None,
    card: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the directory ``out`` and return its bytes; it appears under its name when it is whole.

    Weights keep their number format unless ``dtype`` is given; then one number of each is read beforehand to
    know it.  Otherwise ``read`` is called once for each tensor, or for each block of rows of a large one.
    ``tokenizer_files`` and ``lowercase`` as for `write_tokenizer`; without files the directory has no tokenizer.
    ``max_shard_bytes`` cuts the weights into files of at most that size, ``settings`` are further keys for
    config.json, ``card`` is the text of README.md, ``progress`` hears the bytes written and their total.
    FormatError when ``out`` holds anything already, or cannot be written.
    """
    check_free(out)
    contents = _contents(shape, head, read, dtype)
    need = sum(content.size for content in contents)
    config = config_of(shape, head, str(contents[0].dtype).removeprefix("torch."), settings)
    try:
        with work_folder(out) as folder:
            _check_room(folder, need)
            (folder / CONFIG).write_text(_text(config), encoding="utf-8")
            if card is not None:
                (folder / CARD).write_text(card, encoding="utf-8")
            if tokenizer_files:
                longest = shape.max_position_embeddings
                write_tokenizer(folder, tokenizer_files, lowercase=lowercase, longest=longest)
            _write_weights(folder, _shards(contents, max_shard_bytes), Counter(need, progress).advance)
            return _finish(folder, out)
    except OSError as error:
        raise FormatError(no_room(out, need, error)) from error


class Counter:
    """Adds up bytes and tells ``progress`` how many of ``total`` are done."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def advance(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more."""
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _contents(shape: ModelShape, head: Head, read: Reader, dtype: torch.dtype | None) -> list[Content]:
    """Tensors as files hold them: tied copies left out, the bias of an untied decoder written twice."""
    sizes = tensor_shapes(shape, head)
    names = {name_in_file(name, head): name for name in sizes}
    if BIAS in sizes and not shape.tie_word_embeddings:
        names[DECODER_BIAS] = BIAS
    source = converting(read, dtype)
    return [
        Content(
            written,
            sizes[name],
            dtype or dtype_of(read, name, sizes[name]),
            partial(read_in_blocks, source, name, sizes[name]),
        )
        for written, name in names.items()
    ]


def _shards(contents: Sequence[Content], largest: int | None) -> list[list[Content]]:
    """Contents in order, a new shard before the one that would make it larger than ``largest`` bytes."""
    shards: list[list[Content]] = [[]]
    filled = 0
    for content in contents:
        if largest is not None and shards[-1] and filled + content.size > largest:
            shards.append([])
            filled = 0
        shards[-1].append(content)
        filled += content.size
    return shards


def _check_room(directory: Path, need: int) -> None:
    if need > shutil.disk_usage(directory).free:
        raise OSError("the disk is too full")


def _write_weights(directory: Path, shards: Sequence[Sequence[Content]], advance: Callable[[int], None]) -> None:
    if len(shards) == 1:
        write_tensor_file(directory / WEIGHTS, shards[0], metadata=_METADATA, advance=advance)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensor_file(directory / name, shard, metadata=_METADATA, advance=advance)
        weight_map.update({content.name: name for content in shard})
    contents = [content for shard in shards for content in shard]
    totals: dict[str, JSON] = {
        "total_parameters": sum(prod(content.shape) for content in contents),
        "total_size": sum(content.size for content in contents),
    }
    (directory / INDEX).write_text(_text({"metadata": totals, "weight_map": weight_map}), encoding="utf-8")


def _text(value: Mapping[str, JSON]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _finish(temporary: Path, out: Path) -> int:
    """Sync, rename, and return the number of bytes."""
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    size = sum(path.stat().st_size for path in temporary.iterdir())
    temporary.rename(out)
    sync(out.absolute().parent)
    return size
