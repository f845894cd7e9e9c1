"""What every order of passes has to keep, whoever wrote it."""

from collections.abc import Sequence

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.instructions import Compute, Order, Phase

# Passes that take each other's place, and so ascend together.
_KINDS = {
    "forwards": (Phase.FORWARD,),
    "backwards": (Phase.BACKWARD, Phase.INPUT_GRADIENT),
    "weight gradients": (Phase.WEIGHT_GRADIENT,),
}
_WANTED = {
    "forwards": "write an F for each microbatch, and no more",
    "backwards": "write a B, or an I and later a W, for each microbatch, and no more",
    "weight gradients": "write a W for each I, and no more",
}
_BEFORE = {
    Phase.BACKWARD: Phase.FORWARD,
    Phase.INPUT_GRADIENT: Phase.FORWARD,
    Phase.WEIGHT_GRADIENT: Phase.INPUT_GRADIENT,
}


def check_order(order: Order, *, num_chunks: int, num_microbatches: int) -> None:
    """Raise ScheduleError unless one rank's order of training has every pass once, ascending, and in its place.

    On each chunk, forwards run over all microbatches in ascending order, since messages and sums have one order
    everywhere.  So do backwards, joint or input gradients alone.  Weight gradients ascend over the microbatches
    whose input gradient is alone.  A backward comes after its forward, a weight gradient after its input
    gradient.
    """
    for chunk in range(num_chunks):
        passes = [compute for compute in order if compute.chunk == chunk]
        split = [c.microbatch for c in passes if c.phase is Phase.INPUT_GRADIENT]
        everything = range(num_microbatches)
        for kind, expected in (
            ("forwards", everything),
            ("backwards", everything),
            ("weight gradients", split),
        ):
            found = [c.microbatch for c in passes if c.phase in _KINDS[kind]]
            _check_ascending(f"{kind} of chunk {chunk}", found, expected)
        _check_places(passes)


def _check_ascending(kind: str, found: Sequence[int], expected: Sequence[int]) -> None:
    for place, (is_, should) in enumerate(zip(found, expected, strict=False)):
        if is_ != should:
            raise ScheduleError(
                f"{kind} must take every microbatch once in ascending order, but number {place} of them is "
                f"microbatch {is_} and should be {should}; sums must have one order under every schedule"
            )
    if len(found) != len(expected):
        wanted = _WANTED[kind.partition(" of ")[0]]
        raise ScheduleError(f"there are {len(found)} {kind}, and there must be {len(expected)}: {wanted}")


def _check_places(passes: Sequence[Compute]) -> None:
    done: set[tuple[Phase, int]] = set()
    for compute in passes:
        before = _BEFORE.get(compute.phase)
        if before and (before, compute.microbatch) not in done:
            raise ScheduleError(
                f"the {compute.phase.value} of microbatch {compute.microbatch} (chunk {compute.chunk}) comes "
                f"before its {before.value}; move it behind"
            )
        done.add((compute.phase, compute.microbatch))
