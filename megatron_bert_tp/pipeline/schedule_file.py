"""Schedules that a user writes by hand: a text file with one line of passes for each rank.

::

    # F forward, B backward, I input gradient, W weight gradient; F3.1 is microbatch 3 of chunk 1
    placement: straight
    microbatches: 2
    rank 0: F0 F1 B0 B1
    rank 1: F0 B0 F1 B1
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.exchange import programs_of_orders
from megatron_bert_tp.pipeline.instructions import Compute, Order, Phase
from megatron_bert_tp.pipeline.placement import Placement, looping, v_shaped
from megatron_bert_tp.pipeline.rules import check_order
from megatron_bert_tp.pipeline.simulate import Durations, simulate

LARGEST_FILE = 1_000_000
MOST_RANKS = 1024
HEADER = (
    "# megatron_bert_tp schedule: F forward, B backward, I input gradient, W weight gradient; "
    "F3.1 = microbatch 3 of chunk 1"
)
LETTERS = {
    "F": Phase.FORWARD,
    "B": Phase.BACKWARD,
    "I": Phase.INPUT_GRADIENT,
    "W": Phase.WEIGHT_GRADIENT,
}
# How many chunks a placement may have, and how it is built from ranks and chunks.
PLACEMENTS: dict[str, tuple[range, Callable[[int, int], Placement]]] = {
    "straight": (range(1, 2), looping),
    "looping": (range(1, 100), looping),
    "v": (range(2, 3), lambda num_ranks, _num_chunks: v_shaped(num_ranks)),
}
_WORD = re.compile(r"([FBIW])([0-9]{1,6})(?:\.([0-9]{1,2}))?")
_LINE = re.compile(r"(placement|microbatches|rank ([0-9]{1,4})):(.*)")


@dataclass(frozen=True)
class ScheduleFile:
    """What a schedule file says of training: where the virtual stages are, and every rank's order of passes."""

    placement: Placement
    orders: tuple[Order, ...]

    @property
    def num_microbatches(self) -> int:
        """Microbatches that the orders are made for."""
        return 1 + max(compute.microbatch for compute in self.orders[0])


@dataclass
class _Text:
    """The lines of a file by what they say; ``lines`` has the number of each."""

    path: Path
    settings: dict[str, str] = field(default_factory=dict)
    ranks: dict[int, Order] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def refuse(self, problem: str, *, line: int | None = None) -> NoReturn:
        place = f"{self.path}, line {line}" if line else str(self.path)
        raise ScheduleError(f"{place}: {problem}")

    def number(self, rank: int) -> int:
        return self.lines[f"rank {rank}"]


def read_schedule(path: Path) -> ScheduleFile:
    """The schedule in a text file, checked.

    A schedule without backwards is refused: a run would go through its steps and train nothing.  Raises
    ScheduleError with file, line, rule, value and way out for a file that cannot be read, is larger than
    `LARGEST_FILE` bytes, or breaks the format; for orders that break `check_order`; and for a deadlock.
    """
    text = _Text(path)
    for number, line in enumerate(_read(text).splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if content:
            _take_line(text, number, content)
    schedule = _assemble(text)
    try:
        for overlaps in (False, True):
            programs = programs_of_orders(schedule.orders, schedule.placement, overlaps=overlaps)
            durations = Durations.equal(schedule.placement.num_stages, forward=1, backward=2)
            simulate(programs, schedule.placement, durations)
    except ScheduleError as error:
        text.refuse(str(error))
    return schedule


def _read(text: _Text) -> str:
    if not text.path.is_file():
        text.refuse("there is no such file; give the path of a schedule file")
    with text.path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        text.refuse(f"the file has more than {LARGEST_FILE} bytes; a schedule file has one line for each rank")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text.refuse(f"byte {error.start} is no UTF-8; a schedule file is plain text")


def _take_line(text: _Text, number: int, content: str) -> None:
    match = _LINE.fullmatch(content)
    if not match:
        text.refuse(
            f"{content[:40]!r} is no line of a schedule; write 'placement: ...', 'microbatches: ...' or "
            f"'rank 0: F0 B0 ...'",
            line=number,
        )
    key = match[1] if match[2] is None else f"rank {int(match[2])}"
    if key in text.lines:
        text.refuse(f"{key!r} stands in line {text.lines[key]} already; keep one of them", line=number)
    text.lines[key] = number
    if match[2] is None:
        text.settings[key] = match[3].strip()
    else:
        text.ranks[int(match[2])] = tuple(_pass(text, number, word) for word in match[3].split())


def _pass(text: _Text, number: int, word: str) -> Compute:
    match = _WORD.fullmatch(word)
    if not match:
        text.refuse(
            f"{word[:40]!r} is no pass; write F, B, I or W, the microbatch, and where a rank has several chunks "
            "a dot and the chunk, such as F3 or F3.1",
            line=number,
        )
    return Compute(LETTERS[match[1]], int(match[2]), int(match[3] or 0))


def _assemble(text: _Text) -> ScheduleFile:
    num_microbatches = _num_microbatches(text)
    placement = _placement(text)
    orders = tuple(text.ranks[rank] for rank in range(placement.num_ranks))
    for rank, order in enumerate(orders):
        try:
            check_order(order, num_chunks=placement.num_chunks, num_microbatches=num_microbatches)
        except ScheduleError as error:
            text.refuse(f"rank {rank}: {error}", line=text.number(rank))
    return ScheduleFile(placement, orders)


def _setting(text: _Text, key: str, example: str) -> str:
    if key not in text.settings:
        text.refuse(f"the line '{key}: ...' is missing; add, for example, '{key}: {example}'")
    return text.settings[key]


def _num_microbatches(text: _Text) -> int:
    value = _setting(text, "microbatches", "8")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", value):
        line = text.lines["microbatches"]
        text.refuse(f"microbatches must be a number from 1 to 999999, got {value!r}", line=line)
    return int(value)


def _placement(text: _Text) -> Placement:
    name = _setting(text, "placement", "straight")
    if name not in PLACEMENTS:
        text.refuse(
            f"placement must be one of {', '.join(PLACEMENTS)}, got {name!r}", line=text.lines["placement"]
        )
    num_ranks = len(text.ranks)
    if not num_ranks or sorted(text.ranks) != list(range(num_ranks)) or num_ranks > MOST_RANKS:
        text.refuse(
            f"there must be a line for every rank from 0 on, and at most {MOST_RANKS}, got ranks "
            f"{sorted(text.ranks)[:20]}; the pipeline has as many ranks as there are lines"
        )
    allowed, build = PLACEMENTS[name]
    chunks = {rank: 1 + max((c.chunk for c in order), default=0) for rank, order in text.ranks.items()}
    for rank, count in chunks.items():
        if count not in allowed or count != chunks[0]:
            text.refuse(
                f"rank {rank} has {count} chunks; placement {name} takes {_from_to(allowed)}, and every rank as "
                f"many as rank 0, which has {chunks[0]}; number the chunks of each rank from 0, without gaps",
                line=text.number(rank),
            )
    return build(num_ranks, chunks[0])


def _from_to(numbers: range) -> str:
    """A range in words."""
    return str(numbers.start) if len(numbers) == 1 else f"{numbers.start} to {numbers.stop - 1}"


def write_schedule(orders: Sequence[Order], placement: Placement) -> str:
    """Text of a schedule file with these orders, such as `orders_of` gives.

    `read_schedule` gives back those of training.
    """
    name = _placement_name(placement)
    num_microbatches = 1 + max(compute.microbatch for compute in orders[0])
    rows = [
        f"rank {rank}: " + " ".join(_word(compute, placement.num_chunks) for compute in order)
        for rank, order in enumerate(orders)
    ]
    return "\n".join([HEADER, f"placement: {name}", f"microbatches: {num_microbatches}", *rows, ""])


def _placement_name(placement: Placement) -> str:
    for name, (allowed, build) in PLACEMENTS.items():
        if placement.num_chunks in allowed and placement == build(placement.num_ranks, placement.num_chunks):
            return name
    raise ScheduleError(
        f"a schedule file takes one of the placements {', '.join(PLACEMENTS)}, and not {placement.stages}"
    )


def _word(compute: Compute, num_chunks: int) -> str:
    letter = next(letter for letter, phase in LETTERS.items() if phase is compute.phase)
    chunk = f".{compute.chunk}" if num_chunks > 1 else ""
    return f"{letter}{compute.microbatch}{chunk}"
