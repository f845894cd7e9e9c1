"""Saving while the run goes on: a copy of what is saved, and one thread that writes it.

The thread talks to its fellows on the other ranks over the saver's own agreement, so that its messages meet none
of the training's.  A process that dies meanwhile leaves a partial directory, which no reader looks at.
"""

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.directories import Keep
from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.checkpoint.ranks import Ranks
from megatron_bert_tp.checkpoint.save import Saved, save_checkpoint
from megatron_bert_tp.checkpoint.slices import Rectangle


class Saver:
    """Saves checkpoints into ``root``, one at a time; every rank makes the same calls of `begin`.

    ``agreement`` is the saver's alone.  Where it saves ``in_background``, host memory holds a second copy of all
    that this rank saves until it is written.
    """

    def __init__(self, root: Path, agreement: Ranks, *, keep: Keep, in_background: bool) -> None:
        self._root, self._agreement = root, agreement
        self.keep = keep
        """What a save that has become whole leaves of the others; it may change between saves."""
        self._in_background = in_background
        self.newest: Path | None = None
        """The last checkpoint that was written; set by the thread that writes."""
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._error: Exception | None = None

    def begin(
        self,
        step: int,
        rectangles: Sequence[Rectangle],
        *,
        facts: Mapping[str, JSON],
        attachments: Mapping[str, Path],
    ) -> None:
        """Save what the tensors hold now; arguments as of `save_checkpoint`.  What comes of it `finish` gives.

        In the background it returns as soon as there is a copy of the tensors; else when all is done.
        """
        assert self._is_free, "the save before is not finished: call finish first"
        if not self._in_background:
            self._save(step, rectangles, facts, attachments)
            return
        work = (step, snapshot(rectangles), copy.deepcopy(dict(facts)), dict(attachments))
        # No daemon: an interpreter that ends waits for it, so that a save that was begun is not lost.
        self._thread = threading.Thread(target=self._save, args=work, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written, whatever came of it."""
        if self._thread is not None:
            self._thread.join()

    @property
    def is_busy(self) -> bool:
        """Whether this rank's thread still runs."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> Saved | None:
        """Wait for the save that was begun, and give what it wrote, once; None where there was none.

        Raises what it failed with: SaveError, the same on all ranks, or a bug with the traceback of the thread.
        """
        self.wait()
        saved, error = self._saved, self._error
        self._thread = self._saved = self._error = None
        if error is not None:
            raise error
        return saved

    @property
    def _is_free(self) -> bool:
        return self._thread is None and self._saved is None and self._error is None

    def _save(
        self,
        step: int,
        rectangles: Sequence[Rectangle],
        facts: Mapping[str, JSON],
        attachments: Mapping[str, Path],
    ) -> None:
        try:
            saved = save_checkpoint(
                self._root,
                step,
                rectangles,
                facts=facts,
                attachments=attachments,
                agreement=self._agreement,
                keep=self.keep,
            )
        except Exception as error:  # of a thread nobody would hear it
            self._error = error
        else:
            self._saved, self.newest = saved, saved.path


def snapshot(rectangles: Sequence[Rectangle]) -> list[Rectangle]:
    """The same rectangles with tensors of their own on the host.

    Those of a GPU are copied into pinned memory one behind another, and waited for once.
    """
    copied = [replace(row, tensor=_copy(row.tensor.detach())) for row in rectangles]
    for device in {row.tensor.device for row in rectangles if row.tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return copied


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone(memory_format=torch.contiguous_format)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
