"""The programs of a run's passes: those of its schedule for training, forwards alone for evaluation."""

from pathlib import Path

from megatron_bert_tp.config.schema import ParallelConfig
from megatron_bert_tp.errors import LayoutError
from megatron_bert_tp.pipeline.exchange import programs_of_orders
from megatron_bert_tp.pipeline.instructions import Program
from megatron_bert_tp.pipeline.messages import check_messages
from megatron_bert_tp.pipeline.placement import Placement
from megatron_bert_tp.pipeline.schedule import placement_of, programs
from megatron_bert_tp.pipeline.schedule_file import ScheduleFile, read_schedule

EVALUATION = "forward_only"


class Passes:
    """What a rank does with a number of microbatches, remembered for each number."""

    def __init__(self, parallel: ParallelConfig) -> None:
        """Raises LayoutError or ScheduleError where a schedule file does not fit the settings."""
        self._schedule, self._overlaps = parallel.schedule, parallel.overlap_messages
        self._file = None if parallel.schedule_file is None else _open(Path(parallel.schedule_file), parallel)
        if self._file is None:
            self.placement: Placement = placement_of(parallel.schedule, parallel.pipeline, parallel.virtual)
        else:
            self.placement = self._file.placement
        self._known: dict[tuple[bool, int], tuple[Program, ...]] = {}

    def check_batches(self, numbers: tuple[int, ...] | None) -> None:
        """LayoutError where a schedule file does not fit the microbatches that steps may have (None: any)."""
        if self._file is None:
            return
        if numbers is None:
            raise LayoutError(
                "parallel.schedule_file is for one number of microbatches, and with parallel.packing that changes "
                "from step to step; set parallel.packing: none, or take one of the other schedules"
            )
        for number in numbers:
            _check_number(self._file, number)

    def training(self, num_microbatches: int, rank: int) -> Program:
        """Forwards and backwards of ``rank``."""
        return self._of(True, num_microbatches)[rank]

    def evaluation(self, num_microbatches: int, rank: int) -> Program:
        """Forwards alone."""
        return self._of(False, num_microbatches)[rank]

    def _of(self, trains: bool, num_microbatches: int) -> tuple[Program, ...]:
        key = trains, num_microbatches
        if key not in self._known:
            self._known[key] = self._make(trains, num_microbatches)
            check_messages(self._known[key], self.placement)
        return self._known[key]

    def _make(self, trains: bool, num_microbatches: int) -> tuple[Program, ...]:
        if trains and self._file is not None:
            return programs_of_orders(self._file.orders, self.placement, overlaps=self._overlaps)
        name = self._schedule if trains else EVALUATION
        return programs(name, self.placement, num_microbatches, overlaps=self._overlaps)


def _open(path: Path, parallel: ParallelConfig) -> ScheduleFile:
    file = read_schedule(path)
    found = file.placement.num_ranks, file.placement.num_chunks
    if found != (parallel.pipeline, parallel.virtual):
        raise LayoutError(
            f"{path}: is for {found[0]} ranks of {found[1]} stages each, but parallel.pipeline is "
            f"{parallel.pipeline} and parallel.virtual {parallel.virtual}; set these to {found[0]} and "
            f"{found[1]}, or take another file"
        )
    return file


def _check_number(file: ScheduleFile, num_microbatches: int) -> None:
    if file.num_microbatches != num_microbatches:
        raise LayoutError(
            f"parallel.schedule_file has {file.num_microbatches} microbatches, but a replica's share of this step "
            f"has {num_microbatches}; write the file for as many, or change optimizer.global_batch or "
            "parallel.microbatch"
        )
