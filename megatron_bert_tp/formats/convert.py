"""Conversion between checkpoints and Hugging Face directories; each returns what to tell the user."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from megatron_bert_tp.checkpoint.durable import JSON, readable
from megatron_bert_tp.checkpoint.model import ARCHITECTURE, MODEL
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.checkpoint.save import save_whole
from megatron_bert_tp.checkpoint.tensor_file import Content, read_in_blocks
from megatron_bert_tp.formats.card import card_of
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from megatron_bert_tp.formats.huggingface_writer import Counter, write_directory
from megatron_bert_tp.formats.number_formats import converting
from megatron_bert_tp.formats.task_folder import model_folder
from megatron_bert_tp.formats.weights import HUGGINGFACE, LOWERCASE, ModelSource
from megatron_bert_tp.formats.work_folder import check_free
from megatron_bert_tp.model.shape import tensor_shapes

__all__ = ["LOWERCASE", "from_huggingface", "to_huggingface"]

Progress = Callable[[int, int], None]
"""Hears the bytes that are written, and how many there will be."""


def to_huggingface(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
    is_verified: bool = False,
) -> str:
    """Export weights, tokenizer, settings and a model card of a checkpoint, or of the newest one of a run.

    CheckpointError when it is damaged (every SHA-256 is compared, unless that was just done); FormatError when
    ``out`` cannot be written.
    """
    check_free(out)
    opened = Checkpoint.open(checkpoint)
    source = ModelSource.of_checkpoint(opened)
    if not is_verified:
        opened.verify()
    size = write_directory(
        out,
        source.shape,
        source.read,
        source.tokenizer_files,
        head=source.head,
        lowercase=source.lowercase,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        settings=source.settings,
        card=card_of(opened, source, dtype=dtype),
        progress=progress,
    )
    missing = "" if source.tokenizer_files else ", without a tokenizer"
    best = model_folder(checkpoint)
    other = "" if best == checkpoint else f"; the newest step: the best one of this run is in {best} already"
    return f"{out}: Hugging Face directory of step {opened.step}, {readable(size)}{missing}{other}"


def from_huggingface(
    directory: Path, out: Path, *, dtype: torch.dtype | None = None, progress: Progress | None = None
) -> str:
    """Import a Hugging Face directory as a checkpoint of step 0, without optimizer state, in the folder ``out``.

    FormatError when it cannot be read or ``out`` is not free; CheckpointError when ``out`` cannot be written.
    """
    check_free(out)
    source = HuggingFaceDirectory.open(directory)
    contents = _contents(source, dtype)
    existed = out.exists()
    facts: dict[str, JSON] = {
        MODEL: asdict(source.shape),
        ARCHITECTURE: source.head.architecture,
        HUGGINGFACE: source.settings,
    }
    try:
        save_whole(
            out,
            0,
            contents,
            facts=facts,
            attachments=source.tokenizer_files,
            advance=Counter(sum(content.size for content in contents), progress).advance,
        )
    except BaseException:
        _remove_what_was_begun(out, existed=existed)
        raise
    return f"{out}: checkpoint of step 0 without optimizer state, {readable(Checkpoint.open(out).size)}"


def _contents(source: HuggingFaceDirectory, dtype: torch.dtype | None) -> list[Content]:
    read = converting(source.read, dtype)
    return [
        Content(f"weight/{name}", shape, dtype or source.dtype(name), partial(read_in_blocks, read, name, shape))
        for name, shape in tensor_shapes(source.shape, source.head).items()
    ]


def _remove_what_was_begun(out: Path, *, existed: bool) -> None:
    """Leave the place as it was, so that the next try finds it free."""
    if not out.is_dir():
        return
    for path in out.glob("step_*.partial-*"):
        shutil.rmtree(path)
    if not existed and not any(out.iterdir()):
        out.rmdir()
