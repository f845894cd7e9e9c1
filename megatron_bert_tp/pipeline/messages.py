"""Whether the messages of pipeline programs fit together: what can be told without running them."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.schedule import (
    Await,
    Compute,
    Launch,
    Phase,
    Program,
    Transfer,
    input_transfers,
    output_transfers,
)


def describe(transfer: Transfer) -> str:
    """A transfer in words, for messages to people."""
    content = "hidden states" if transfer.phase is Phase.FORWARD else "gradient"
    chunk = f" (chunk {transfer.chunk})" if transfer.chunk else ""
    route = f"from stage {transfer.source} to stage {transfer.target}"
    return f"{content} of microbatch {transfer.microbatch}{chunk} {route}"


def check_messages(programs: Sequence[Program]) -> None:
    """Raise ScheduleError unless every message is sent, received and used as its sender meant.

    The rules: a stage launches only its own transfers, once each, and awaits each once, after its launch; a
    pass comes after the `Await` of its input, a send after the pass that produces it, a backward after
    its forward; and from one stage to another, receives are launched in the order of the sends.
    """
    for stage, program in enumerate(programs):
        _check_stage(stage, program, len(programs))
    for source in range(len(programs)):
        for target in range(len(programs)):
            _check_direction(programs, source, target)


def _launched(program: Program) -> Iterator[Transfer]:
    for instruction in program:
        if isinstance(instruction, Launch):
            yield from instruction.transfers


def _check_direction(programs: Sequence[Program], source: int, target: int) -> None:
    sent, received = (
        [t for t in _launched(programs[stage]) if (t.source, t.target) == (source, target)]
        for stage in (source, target)
    )
    for number, (send, receive) in enumerate(zip_longest(sent, received)):
        if send == receive:
            continue
        outgoing, incoming = (describe(t) if t else "nothing" for t in (send, receive))
        raise ScheduleError(
            f"message {number} from stage {source} to stage {target} does not match: stage {source} sends "
            f"{outgoing}, stage {target} receives {incoming}; both must launch the same messages in one order"
        )


class _Record:
    """What one stage has done so far, and the rules that its next instruction must keep."""

    def __init__(self, stage: int, num_stages: int) -> None:
        self._stage, self._num_stages = stage, num_stages
        self.launched: set[Transfer] = set()
        self.awaited: set[Transfer] = set()
        self._produced: set[Transfer] = set()
        self._forwards: set[Compute] = set()

    def require(self, rule: bool, problem: str) -> None:
        if not rule:
            raise ScheduleError(f"stage {self._stage} {problem}")

    def compute(self, compute: Compute) -> None:
        name = f"{compute.phase.value} of microbatch {compute.microbatch}"
        for transfer in input_transfers(compute, self._stage, self._num_stages):
            self.require(transfer in self.awaited, f"starts the {name} before it awaits {describe(transfer)}")
        forward = Compute(Phase.FORWARD, compute.microbatch, compute.chunk)
        if compute.phase is Phase.BACKWARD:
            self.require(forward in self._forwards, f"starts the {name} before its forward")
        else:
            self._forwards.add(compute)
        self._produced.update(output_transfers(compute, self._stage, self._num_stages))

    def launch(self, transfer: Transfer) -> None:
        name = describe(transfer)
        ends = (transfer.source, transfer.target)
        is_inside = all(0 <= end < self._num_stages for end in ends)
        self.require(self._stage in ends, f"launches {name}, which is not its own")
        self.require(is_inside, f"launches {name}, but the stages are 0 to {self._num_stages - 1}")
        self.require(transfer not in self.launched, f"launches {name} twice")
        is_ready = transfer.source != self._stage or transfer in self._produced
        self.require(is_ready, f"sends {name} before it is computed")
        self.launched.add(transfer)

    def await_(self, transfer: Transfer) -> None:
        self.require(transfer in self.launched, f"awaits {describe(transfer)} before its launch")
        self.require(transfer not in self.awaited, f"awaits {describe(transfer)} twice")
        self.awaited.add(transfer)


def _check_stage(stage: int, program: Program, num_stages: int) -> None:
    record = _Record(stage, num_stages)
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
    for transfer in record.launched - record.awaited:
        record.require(False, f"never awaits {describe(transfer)}, so its buffer is never free")
