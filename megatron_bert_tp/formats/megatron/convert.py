"""Megatron-LM checkpoints to Hugging Face directories, and models to Megatron-LM checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from megatron_bert_tp.checkpoint.durable import JSON, no_room, readable, sync, write_text
from megatron_bert_tp.checkpoint.read import Reader
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.huggingface_writer import write_directory
from megatron_bert_tp.formats.megatron.arguments import (
    Tell,
    Wishes,
    agreed_arguments,
    check_arguments,
    is_lowercase,
    logical_rows,
    padded_shape,
)
from megatron_bert_tp.formats.megatron.exportable import check_divisible, check_exportable
from megatron_bert_tp.formats.megatron.gather import gather, sizes_of
from megatron_bert_tp.formats.megatron.isolated import RankContent, open_content, unpickle_in_child
from megatron_bert_tp.formats.megatron.merge import MergedModel
from megatron_bert_tp.formats.megatron.names import TOKEN_TYPES
from megatron_bert_tp.formats.megatron.qkv import order_of
from megatron_bert_tp.formats.megatron.rank_files import FILE, RELEASE, TRACKER, Place, folder_of, grid_size
from megatron_bert_tp.formats.megatron.source import find_files
from megatron_bert_tp.formats.megatron.write import RankWriter
from megatron_bert_tp.formats.number_formats import converting
from megatron_bert_tp.formats.tokenizer_files import VOCABULARY, judged_lowercase
from megatron_bert_tp.formats.work_folder import check_free, work_folder
from megatron_bert_tp.model.shape import Head, ModelShape

Progress = Callable[[int, int], None]


def from_megatron(
    source: Path,
    out: Path,
    *,
    vocab_size: int | None = None,
    huggingface_epsilon: bool = False,
    hidden_act: str | None = None,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    tell: Tell,
    progress: Progress | None = None,
) -> str:
    """Import a Megatron-LM checkpoint as the Hugging Face directory ``out``; what was assumed goes to ``tell``.

    ``source`` is a zip, a directory of any tensor x pipeline size, or the one ``.pt`` of a rank.  ``vocab_size``
    cuts padded rows off, ``tokenizer`` is a ``vocab.txt`` to go along, ``progress`` hears bytes and their total.
    FormatError when the source is damaged, unsafe or no BERT, or when ``out`` is not free or cannot be written.
    """
    check_free(out)
    if tokenizer is not None and not tokenizer.is_file():
        raise FormatError(f"{tokenizer}: no such file; the tokenizer of a BERT is its {VOCABULARY}")
    vocabulary = {} if tokenizer is None else {VOCABULARY: tokenizer}
    is_uncased = judged_lowercase(vocabulary)
    wishes = Wishes(vocab_size, huggingface_epsilon, hidden_act, num_attention_heads)
    try:
        with work_folder(out) as folder:
            ranks = _open_ranks(source, folder)
            arguments = agreed_arguments(list(ranks.values()))
            model = _merge(ranks, arguments, wishes, tell, source=str(source))
            rows = logical_rows(arguments, model.shape.vocab_size, wishes, tell, source=str(source))
            size = write_directory(
                out,
                replace(model.shape, vocab_size=rows),
                model.read,
                vocabulary,
                head=model.head,
                lowercase=_case(is_lowercase(arguments), is_uncased, tell),
                dtype=dtype,
                progress=progress,
            )
    except OSError as error:
        raise FormatError(no_room(out, _size_of(source), error)) from error
    missing = "" if tokenizer else ", without a tokenizer"
    return f"{out}: Hugging Face directory of a {model.head.architecture}, {readable(size)}{missing}"


def to_megatron(
    shape: ModelShape,
    head: Head,
    read: Reader,
    out: Path,
    *,
    tensor: int,
    pipeline: int,
    lowercase: bool | None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> str:
    """Export a model as the directory ``out`` of Megatron-LM's checkpoint version 3.0, cut tensor x pipeline.

    ``lowercase`` is whether its tokenizer is uncased; ``progress`` hears bytes and their total.
    FormatError when Megatron-LM has no such model, LayoutError when it cannot be divided so; FormatError too when
    ``out`` is not free or cannot be written.
    """
    check_free(out)
    check_exportable(shape, head)
    check_divisible(shape, tensor=tensor, pipeline=pipeline)
    writer = RankWriter(shape, head, converting(read, dtype), tensor, pipeline, lowercase)
    try:
        with work_folder(out) as folder:
            _write_ranks(writer, folder, progress)
            size = sum(path.stat().st_size for path in folder.rglob("*.pt"))
            folder.rename(out)
            sync(out.absolute().parent)
    except OSError as error:
        raise FormatError(f"{out}: cannot be written: {error}; free some space, or choose another") from error
    ranks = f"{tensor} x {pipeline} ranks (tensor x pipeline)"
    return "; ".join([f"{out}: Megatron-LM checkpoint for {ranks}, {readable(size)}", *writer.remarks()])


def _write_ranks(writer: RankWriter, folder: Path, progress: Progress | None) -> None:
    """Write and sync the files of all ranks, one after another, and the tracker that names them."""
    places = [(rank, stage) for stage in range(writer.pipeline) for rank in range(writer.tensor)]
    for number, (rank, stage) in enumerate(places, 1):
        path = folder / RELEASE / folder_of(rank, stage, pipeline=writer.pipeline) / FILE
        path.parent.mkdir(parents=True)
        _save(writer.content(rank, stage), path)
        if progress is not None:
            progress(writer.size * number // len(places), writer.size)
    write_text(folder / TRACKER, RELEASE)
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _save(content: Mapping[str, object], path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(str(error)) from error


def _open_ranks(source: Path, folder: Path) -> dict[Place, RankContent]:
    """What the files of all ranks hold, laid down in ``folder`` in formats that run no code."""
    files = find_files(source, folder)
    unpickle_in_child(list(files.values()), folder)
    for file in files.values():
        if file.path.parent == folder:  # taken out of a zip; not needed any more
            file.path.unlink()
    return {place: open_content(number, file, folder) for number, (place, file) in enumerate(files.items())}


def _merge(
    ranks: Mapping[Place, RankContent],
    arguments: Mapping[str, JSON],
    wishes: Wishes,
    tell: Tell,
    *,
    source: str,
) -> MergedModel:
    tensor, pipeline = grid_size(ranks)
    check_arguments(arguments, tensor=tensor, pipeline=pipeline, source=source)
    gathered = gather(ranks)
    order = order_of(gathered.version, source=source)
    found = sizes_of(gathered, tensor=tensor, source=source)
    shape = padded_shape(arguments, found, wishes, tell, source=source)
    if not found.types:
        tell(f"type_vocab_size 1: the file has no token types; {TOKEN_TYPES} is one row of zeros")
    return MergedModel.of(gathered, shape, order, tensor=tensor, source=source)


def _case(said: bool | None, judged: bool | None, tell: Tell) -> bool | None:
    """Whether the tokenizer is uncased: the entries of the vocabulary count more than the arguments."""
    if judged is None:
        return said
    if said not in (None, judged):
        kinds = {True: "uncased", False: "cased"}
        tell(
            f"do_lower_case {str(judged).lower()}: by its entries the vocabulary is {kinds[judged]}, although "
            f"tokenizer_type in the file says {kinds[not judged]}; is it the one of the training?"
        )
    return judged


def _size_of(source: Path) -> int:
    """Bytes that an import needs beside the source: about twice as many."""
    files = [source] if source.is_file() else source.glob("**/*.pt")
    return 2 * sum(file.stat().st_size for file in files)
