"""The folder of a run on a task: what lies where, before any of it is opened."""

from pathlib import Path

from megatron_bert_tp.formats.huggingface_config import CONFIG

BEST_MODEL = "model"
"""The export of the best checkpoint."""
RESULT = "result.json"
"""What came of a training, written last."""
EVALUATED = "metrics.json"
"""What an evaluation has measured, written last."""


def model_folder(path: Path) -> Path:
    """The export of the best checkpoint where ``path`` is a finished run on a task, else ``path``."""
    is_finished = (path / RESULT).is_file() and (path / BEST_MODEL / CONFIG).is_file()
    return path / BEST_MODEL if is_finished else path


def seed_folder(path: Path, seed: int) -> Path:
    """Folder of the training with one of several seeds."""
    return path / f"seed_{seed}"


def seed_folders(path: Path) -> list[Path]:
    """Folders of all seeds that were trained in ``path``, by number."""
    seeds = (folder.name.removeprefix("seed_") for folder in path.glob("seed_*/"))
    return [seed_folder(path, seed) for seed in sorted(int(each) for each in seeds if each.isdecimal())]
