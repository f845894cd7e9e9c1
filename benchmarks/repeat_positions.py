"""Give a Hugging Face directory positions for longer rows: those that have been trained, repeated.

    python benchmarks/repeat_positions.py DIR --trained 64

Rows ``trained`` and on of the position embedding become rows 1 to ``trained - 2``, again and again: [CLS] alone
stands at 0, and the last row is where samples end.  What attends to its neighbours does so at the new positions
too (Longformer, arXiv:2004.05150, section 5, begins in this way), while rows that were never trained would have to
learn it one by one.  The file is replaced in one step.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = "bert.embeddings.position_embeddings.weight"


def main() -> None:
    """Replace the weights' file by one with repeated positions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="written by `megatron_bert_tp.convert to-hf`")
    parser.add_argument("--trained", type=int, required=True, help="positions that have been trained")
    given = parser.parse_args()
    file = given.directory / "model.safetensors"
    if not file.exists():
        sys.exit(f"{file} is not there; `python -m megatron_bert_tp.convert to-hf RUN DIR` writes it")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    positions = tensors[NAME]
    if not 3 <= given.trained < len(positions):
        sys.exit(f"--trained {given.trained}: {NAME} has {len(positions)} rows; give 3 to {len(positions) - 1}")
    tensors[NAME] = repeated(positions, given.trained)
    partial = file.with_name(f"{file.name}.partial")
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, file)
    print(f"{file}: rows {given.trained} to {len(positions) - 1} of {NAME} repeat rows 1 to {given.trained - 2}")


def repeated(positions: Tensor, trained: int) -> Tensor:
    """``positions`` ``[rows, hidden]`` with rows ``trained`` and on taken in turn from 1 to ``trained - 2``."""
    rows = torch.arange(len(positions))
    source = torch.where(rows < trained, rows, (rows - 1) % (trained - 2) + 1)
    return positions[source].clone()


if __name__ == "__main__":
    main()
