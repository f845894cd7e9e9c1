"""Whether the messages of pipeline programs fit together: what can be told without running them."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TypeAlias

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.instructions import (
    Await,
    Compute,
    Launch,
    Phase,
    Program,
    Transfer,
    describe,
    input_transfer,
    output_transfer,
)
from megatron_bert_tp.pipeline.placement import Placement

# What must be done with the same microbatch and chunk before a pass, and what must not be.
_BEFORE = {
    Phase.FORWARD: (),
    Phase.BACKWARD: (Phase.FORWARD,),
    Phase.INPUT_GRADIENT: (Phase.FORWARD,),
    Phase.WEIGHT_GRADIENT: (Phase.INPUT_GRADIENT,),
}
_INSTEAD = {Phase.BACKWARD: Phase.INPUT_GRADIENT, Phase.INPUT_GRADIENT: Phase.BACKWARD}


def check_messages(programs: Sequence[Program], placement: Placement) -> None:
    """Raise ScheduleError unless every message is sent, received and used as its sender meant.

    The rules: a rank launches only its own transfers, once each, and awaits each once, after its launch; a
    pass comes once, after the `Await` of its input or after the pass on the same rank that makes it; a send comes
    after the pass that makes it; a backward after its forward, and a weight gradient after its input
    gradient; a microbatch has a joint backward or both of the others; and from one rank to another,
    receives are launched in the order of the sends.
    """
    if len(programs) != placement.num_ranks:
        raise ScheduleError(
            f"{len(programs)} programs for {placement.num_ranks} ranks; give one program for each rank"
        )
    for rank, program in enumerate(programs):
        _check_rank(rank, program, placement)
    launched = [_launched(program) for program in programs]
    for source, target in sorted({direction for own in launched for direction in own}):
        _check_direction(launched, source, target)


_Launched: TypeAlias = Mapping[tuple[int, int], Sequence[Transfer]]


def _launched(program: Program) -> _Launched:
    """What a rank launches by source and target, in order."""
    found: dict[tuple[int, int], list[Transfer]] = {}
    for instruction in program:
        if isinstance(instruction, Launch):
            for transfer in instruction.transfers:
                found.setdefault((transfer.source, transfer.target), []).append(transfer)
    return found


def _check_direction(launched: Sequence[_Launched], source: int, target: int) -> None:
    sent, received = (launched[rank].get((source, target), ()) for rank in (source, target))
    for number, (send, receive) in enumerate(zip_longest(sent, received)):
        if send == receive:
            continue
        outgoing, incoming = (describe(t) if t else "nothing" for t in (send, receive))
        raise ScheduleError(
            f"message {number} from rank {source} to rank {target} does not match: rank {source} sends "
            f"{outgoing}, rank {target} receives {incoming}; both must launch the same messages in one order"
        )


class _Record:
    """What one rank has done so far, and the rules that its next instruction must keep."""

    def __init__(self, rank: int, placement: Placement) -> None:
        self._rank, self._placement = rank, placement
        self.launched: set[Transfer] = set()
        self.awaited: set[Transfer] = set()
        self.passes: set[Compute] = set()
        self._made: set[Transfer] = set()

    def require(self, rule: bool, problem: str) -> None:
        if not rule:
            raise ScheduleError(f"rank {self._rank} {problem}")

    def compute(self, compute: Compute) -> None:
        chunk = f" (chunk {compute.chunk})" if compute.chunk else ""
        name = f"{compute.phase.value} of microbatch {compute.microbatch}{chunk}"
        last = self._placement.num_chunks - 1
        self.require(0 <= compute.chunk <= last, f"starts the {name}, but its chunks are 0 to {last}")
        self.require(compute not in self.passes, f"starts the {name} twice")
        for phase in _BEFORE[compute.phase]:
            self.require(self._has(compute, phase), f"starts the {name} before its {phase.value}")
        other = _INSTEAD.get(compute.phase, compute.phase)
        self.require(not self._has(compute, other), f"starts the {name} after its {other.value}; have one of them")
        self._require_input(compute, name)
        self.passes.add(compute)
        output = output_transfer(compute, self._rank, self._placement)
        self._made.update([output] if output else [])

    def _has(self, compute: Compute, phase: Phase) -> bool:
        return Compute(phase, compute.microbatch, compute.chunk) in self.passes

    def _require_input(self, compute: Compute, name: str) -> None:
        needed = input_transfer(compute, self._rank, self._placement)
        if needed is None:
            return
        if needed.is_local:
            self.require(needed in self._made, f"starts the {name} before it has made the {describe(needed)}")
        else:
            self.require(needed in self.awaited, f"starts the {name} before it awaits {describe(needed)}")

    def launch(self, transfer: Transfer) -> None:
        name = describe(transfer)
        ends = (transfer.source, transfer.target)
        num_ranks = self._placement.num_ranks
        is_inside = all(0 <= end < num_ranks for end in ends)
        self.require(self._rank in ends, f"launches {name}, which is not its own")
        self.require(is_inside, f"launches {name}, but the ranks are 0 to {num_ranks - 1}")
        self.require(not transfer.is_local, f"launches {name}, which needs no message")
        self.require(transfer not in self.launched, f"launches {name} twice")
        is_ready = transfer.source != self._rank or transfer in self._made
        self.require(is_ready, f"sends {name} before it is computed")
        self.launched.add(transfer)

    def await_(self, transfer: Transfer) -> None:
        self.require(transfer in self.launched, f"awaits {describe(transfer)} before its launch")
        self.require(transfer not in self.awaited, f"awaits {describe(transfer)} twice")
        self.awaited.add(transfer)

    def finish(self) -> None:
        for transfer in self.launched - self.awaited:
            self.require(False, f"never awaits {describe(transfer)}, so its buffer is never free")
        for done in self.passes:
            is_whole = done.phase is not Phase.INPUT_GRADIENT or self._has(done, Phase.WEIGHT_GRADIENT)
            self.require(is_whole, f"has no weight gradient of microbatch {done.microbatch} (chunk {done.chunk})")


def _check_rank(rank: int, program: Program, placement: Placement) -> None:
    record = _Record(rank, placement)
    for instruction in program:
        match instruction:
            case Compute():
                record.compute(instruction)
            case Launch(transfers):
                for transfer in transfers:
                    record.launch(transfer)
            case Await(transfers):
                for transfer in transfers:
                    record.await_(transfer)
    record.finish()
