"""Which format a path seems to hold, by the names of its files alone, and which command reads that."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_bert_tp.checkpoint.directories import POINTER
from megatron_bert_tp.checkpoint.manifest import MANIFEST
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.huggingface_config import CONFIG
from megatron_bert_tp.formats.megatron.rank_files import FILE, TRACKER
from megatron_bert_tp.formats.task_folder import seed_folders


def is_huggingface(path: Path) -> bool:
    """Whether a folder has the settings of a Hugging Face directory."""
    return (path / CONFIG).is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, a folder of checkpoints or that of a run."""
    roots = (path, path / "checkpoints")
    return (path / MANIFEST).is_file() or any((root / POINTER).is_file() or _has_steps(root) for root in roots)


def is_megatron(path: Path) -> bool:
    """Whether a path is called as Megatron-LM calls what it writes, or is a zip."""
    if path.is_file():
        return path.suffix in (".pt", ".zip")
    ranks = (found for folder in ("", "*/") for found in path.glob(f"{folder}mp_rank_*/{FILE}"))
    return (path / TRACKER).is_file() or any(True for _ in ranks)


def check_reads(command: str, path: Path) -> None:
    """FormatError with the commands to use when ``path`` holds a format that ``command`` does not read."""
    found = [kind for kind in _KINDS if kind.holds(path)]
    if found and not any(command in kind.commands for kind in found):
        raise FormatError(f"{path}: this is {found[0].name}; use {' or '.join(found[0].commands)}")


def check_model(path: Path) -> None:
    """FormatError when ``path`` is nothing that weights are read from, with what could be there or be done."""
    if not path.exists():
        raise FormatError(
            f"{path}: there is no such folder; give a Hugging Face directory, a checkpoint or the folder of a run "
            "(names of a hub are not looked up)"
        )
    seeds = seed_folders(path)
    if seeds and not is_huggingface(path) and not is_checkpoint(path):
        raise FormatError(f"{path}: holds trainings of several seeds; give one of them, as {seeds[0]}")
    if is_megatron(path) and not is_checkpoint(path):
        raise FormatError(f"{path}: this is a checkpoint of Megatron-LM; use convert from-ngc on it first")


def _has_steps(root: Path) -> bool:
    return any(True for _ in root.glob(f"step_*/{MANIFEST}"))


@dataclass(frozen=True)
class _Kind:
    name: str
    holds: Callable[[Path], bool]
    commands: tuple[str, ...]


_KINDS = (
    _Kind("a Hugging Face directory", is_huggingface, ("from-hf", "to-ngc")),
    _Kind("a checkpoint of megatron_bert_tp", is_checkpoint, ("to-hf", "to-ngc")),
    _Kind("a checkpoint of Megatron-LM", is_megatron, ("from-ngc",)),
)
