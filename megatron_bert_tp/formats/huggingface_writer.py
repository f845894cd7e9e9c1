"""Writing a Hugging Face directory of a `MegatronBertForPreTraining`, as `save_pretrained` would."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_bert_tp.checkpoint.durable import no_room, sync
from megatron_bert_tp.checkpoint.read import Reader
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.huggingface import BIAS, DECODER_BIAS, WEIGHTS
from megatron_bert_tp.formats.huggingface_config import CONFIG, config_of
from megatron_bert_tp.formats.tokenizer_files import write_tokenizer
from megatron_bert_tp.model.shape import ModelShape, tensor_shapes


def write_directory(
    out: Path,
    shape: ModelShape,
    read: Reader,
    tokenizer_files: Mapping[str, Path],
    *,
    lowercase: bool | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Write the directory ``out`` and return its bytes; it appears under its name when it is whole.

    Weights keep their number format unless ``dtype`` is given; the whole model is held in memory.
    ``tokenizer_files`` and ``lowercase`` as for `write_tokenizer`; without files the directory has no tokenizer.
    FormatError when ``out`` holds anything already, or cannot be written.
    """
    check_free(out)
    tensors = _tensors(shape, read, dtype)
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        _write_weights(partial, shape, tensors)
        if tokenizer_files:
            write_tokenizer(partial, tokenizer_files, lowercase=lowercase, longest=shape.max_position_embeddings)
        return _finish(partial, out)
    except (OSError, SafetensorError) as error:
        need = sum(tensor.nbytes for tensor in tensors.values())
        raise FormatError(no_room(out, need, error)) from error


def check_free(out: Path) -> None:
    """FormatError unless ``out`` does not exist, or is an empty directory."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FormatError(f"{out}: exists already and is not empty; remove it, or give another name")


def _tensors(shape: ModelShape, read: Reader, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Whole tensors as files hold them: tied copies left out, the bias of an untied decoder written twice."""
    tensors = {
        name: read(name, (0,) * len(size), size).to(dtype).contiguous()
        for name, size in tensor_shapes(shape).items()
    }
    if not shape.tie_word_embeddings:
        tensors[DECODER_BIAS] = tensors[BIAS].clone()
    return tensors


def _write_weights(directory: Path, shape: ModelShape, tensors: dict[str, Tensor]) -> None:
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    text = json.dumps(config_of(shape, dtype), indent=2, sort_keys=True) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes files that only their owner reads; an export is for whoever reads its config.json.
    shutil.copymode(directory / CONFIG, directory / WEIGHTS)


def _finish(partial: Path, out: Path) -> int:
    """Sync, rename, and return the number of bytes."""
    for path in (*partial.iterdir(), partial):
        sync(path)
    size = sum(path.stat().st_size for path in partial.iterdir())
    partial.rename(out)
    sync(out.absolute().parent)
    return size
