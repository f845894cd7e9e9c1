"""What the commands of `python -m megatron_bert_tp.convert` do with their arguments; each yields what to print."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from megatron_bert_tp.data.byte_progress import ByteProgress
from megatron_bert_tp.formats.convert import Progress, from_huggingface, to_huggingface
from megatron_bert_tp.formats.inspect import describe
from megatron_bert_tp.formats.recognition import check_reads
from megatron_bert_tp.formats.tokenizer_files import judged_lowercase
from megatron_bert_tp.formats.weights import ModelSource


def _from_hf(given: Namespace) -> Iterator[str]:
    check_reads(given.command, given.directory)
    with _bar("import") as progress:
        text = from_huggingface(given.directory, given.out, dtype=_dtype(given), progress=progress)
    yield text


def _to_hf(given: Namespace) -> Iterator[str]:
    check_reads(given.command, given.checkpoint)
    with _bar("export") as progress:
        text = to_huggingface(
            given.checkpoint,
            given.out,
            dtype=_dtype(given),
            max_shard_bytes=given.max_shard_size,
            progress=progress,
        )
    yield text


def _from_ngc(given: Namespace) -> Iterator[str]:
    from megatron_bert_tp.formats.megatron.convert import from_megatron

    check_reads(given.command, given.source)
    with _bar("import") as progress:
        text = from_megatron(
            given.source,
            given.out,
            vocab_size=given.vocab_size,
            huggingface_epsilon=given.hf_epsilon,
            hidden_act=given.hidden_act,
            num_attention_heads=given.num_attention_heads,
            dtype=_dtype(given),
            tokenizer=given.tokenizer,
            tell=print,
            progress=progress,
        )
    yield text


def _to_ngc(given: Namespace) -> Iterator[str]:
    from megatron_bert_tp.formats.megatron.convert import to_megatron

    check_reads(given.command, given.source)
    source = ModelSource.open(given.source)
    lowercase = source.lowercase
    if lowercase is None:
        lowercase = judged_lowercase(source.tokenizer_files)
    with _bar("export") as progress:
        text = to_megatron(
            source.shape,
            source.head,
            source.read,
            given.out,
            tensor=given.tensor,
            pipeline=given.pipeline,
            lowercase=lowercase,
            dtype=_dtype(given),
            progress=progress,
        )
    yield text


def _inspect(given: Namespace) -> Iterator[str]:
    return describe(given.path, list_tensors=given.tensors)


COMMANDS: Mapping[str, Callable[[Namespace], Iterator[str]]] = {
    "from-hf": _from_hf,
    "to-hf": _to_hf,
    "from-ngc": _from_ngc,
    "to-ngc": _to_ngc,
    "inspect": _inspect,
}


def _dtype(given: Namespace) -> torch.dtype | None:
    return None if given.dtype is None else getattr(torch, given.dtype)


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """Progress on the standard error stream, from the first block on, when the total is known."""
    bar: ByteProgress | None = None
    shown = 0

    def progress(done: int, total: int) -> None:
        nonlocal bar, shown
        if bar is None:
            bar = ByteProgress(title, total)
            bar.__enter__()
        bar.advance(done - shown)
        shown = done

    try:
        yield progress
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
