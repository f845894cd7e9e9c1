"""Conversion between checkpoints and Hugging Face directories; each returns what to tell the user."""

from dataclasses import asdict
from pathlib import Path

from megatron_bert_tp.checkpoint.durable import readable
from megatron_bert_tp.checkpoint.model import MODEL, check_tensors, shape_of
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.checkpoint.save import save_checkpoint
from megatron_bert_tp.checkpoint.slices import Rectangle
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from megatron_bert_tp.formats.huggingface_writer import check_free, write_directory
from megatron_bert_tp.formats.tokenizer_files import TOKENIZER_FILES
from megatron_bert_tp.model.shape import tensor_shapes

LOWERCASE = "lowercase"
"""Fact of a checkpoint: whether its ``vocab.txt`` is uncased."""


def to_huggingface(checkpoint: Path, out: Path) -> str:
    """Export the weights, the tokenizer and the settings of a checkpoint, or of the newest one of a run.

    CheckpointError when it is damaged (every SHA-256 is compared); FormatError when ``out`` cannot be written.
    """
    check_free(out)
    source = Checkpoint.open(checkpoint)
    shape = shape_of(source)
    check_tensors(source, shape)
    source.verify()
    tokenizer = {name: path for name, path in source.attachments.items() if name in TOKENIZER_FILES}
    lowercase = source.facts.get(LOWERCASE)
    size = write_directory(
        out, shape, source.weight, tokenizer, lowercase=lowercase if isinstance(lowercase, bool) else None
    )
    missing = "" if tokenizer else ", without a tokenizer"
    return f"{out}: Hugging Face directory of step {source.step}, {readable(size)}{missing}"


def from_huggingface(directory: Path, out: Path) -> str:
    """Import a Hugging Face directory as a checkpoint of step 0, without optimizer state, in the folder ``out``.

    FormatError when it cannot be read or ``out`` is not free; CheckpointError when ``out`` cannot be written.
    """
    check_free(out)
    source = HuggingFaceDirectory.open(directory)
    rectangles = []
    for name, shape in tensor_shapes(source.shape).items():
        offsets = (0,) * len(shape)
        rectangles.append(Rectangle(f"weight/{name}", shape, offsets, source.read(name, offsets, shape)))
    save_checkpoint(
        out,
        0,
        rectangles,
        facts={MODEL: asdict(source.shape)},
        attachments=source.tokenizer_files,
        rank=0,
        world_size=1,
        agree=_alone,
        keep_last=1,
    )
    return f"{out}: checkpoint of step 0 without optimizer state, {readable(Checkpoint.open(out).size)}"


def _alone(failure: str | None) -> str | None:
    """Agreement of one process with itself."""
    return failure
