"""Where weights may come from: `model.weights=PATH`."""

from pathlib import Path

from megatron_bert_tp.checkpoint.model import check_model, differences
from megatron_bert_tp.checkpoint.read import Checkpoint, Reader
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from megatron_bert_tp.formats.huggingface_config import CONFIG
from megatron_bert_tp.model.shape import ModelShape


def open_weights(path: Path, shape: ModelShape, *, verify: bool) -> Reader:
    """Reader of the weights in a Hugging Face directory, or in one of our checkpoints.

    FormatError or CheckpointError when the path holds neither, or the weights of another model than ``shape``.
    With ``verify`` every file of a checkpoint is compared with its SHA-256, for which one rank is enough.
    """
    if not (path / CONFIG).is_file():
        checkpoint = Checkpoint.open(path)
        check_model(checkpoint, shape)
        if verify:
            checkpoint.verify()
        return checkpoint.weight
    directory = HuggingFaceDirectory.open(path)
    differing = differences(directory.shape, shape)
    if differing:
        raise FormatError(
            f"{path}: the weights are of another model than the settings:\n{differing}\n"
            "set these to the values there, or give other weights"
        )
    return directory.read
