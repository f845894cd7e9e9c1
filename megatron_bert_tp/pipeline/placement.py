"""Which virtual stage of the pipeline lives where: one straight line, a loop, or a V over the ranks."""

from dataclasses import dataclass
from functools import cached_property

from megatron_bert_tp.errors import ScheduleError


@dataclass(frozen=True)
class Placement:
    """``stages[rank][chunk]`` is the number of the virtual stage that a rank holds as its chunk.

    Raises ScheduleError unless all ranks hold equally many, and every number from 0 stands there once.
    """

    stages: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        numbers = sorted(stage for row in self.stages for stage in row)
        is_even = len({len(row) for row in self.stages}) == 1
        if not numbers or not is_even or numbers != list(range(len(numbers))):
            raise ScheduleError(
                f"a placement needs equally many virtual stages on every rank, numbered from 0 without gaps or "
                f"repeats, got {self.stages}; use straight, looping or v_shaped"
            )

    @property
    def num_ranks(self) -> int:
        """Ranks on the pipeline axis."""
        return len(self.stages)

    @property
    def num_chunks(self) -> int:
        """Virtual stages on each rank."""
        return len(self.stages[0])

    @property
    def num_stages(self) -> int:
        """Virtual stages in all."""
        return self.num_ranks * self.num_chunks

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        return {stage: (rank, chunk) for rank, row in enumerate(self.stages) for chunk, stage in enumerate(row)}

    def place_of(self, stage: int) -> tuple[int, int]:
        """(rank, chunk) of a virtual stage."""
        return self._places[stage]

    @property
    def ends(self) -> tuple[int, ...]:
        """Ranks that hold the first and the last virtual stage, ascending; one rank where it holds both."""
        return tuple(sorted({self.place_of(stage)[0] for stage in (0, self.num_stages - 1)}))


def straight(num_ranks: int) -> Placement:
    """One stage on each rank, in order."""
    return looping(num_ranks, 1)


def looping(num_ranks: int, num_virtual: int) -> Placement:
    """Several rounds over the ranks: chunk ``c`` of rank ``r`` is stage ``c * num_ranks + r``."""
    _check(num_ranks, num_virtual)
    return Placement(tuple(tuple(range(rank, num_ranks * num_virtual, num_ranks)) for rank in range(num_ranks)))


def v_shaped(num_ranks: int) -> Placement:
    """Down the ranks and back up: rank 0 holds the first and the last stage (Qi et al. 2024)."""
    _check(num_ranks, 2)
    return Placement(tuple((rank, 2 * num_ranks - 1 - rank) for rank in range(num_ranks)))


def _check(num_ranks: int, num_virtual: int) -> None:
    for value, meaning in ((num_ranks, "ranks"), (num_virtual, "virtual stages on a rank")):
        if value < 1:
            raise ScheduleError(f"a pipeline needs at least one of its {meaning}, got {value}; use 1 or more")
