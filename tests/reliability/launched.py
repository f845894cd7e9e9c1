"""A rank under torchrun that adds up a number again and again, until rank 1 does what its argument says."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_bert_tp.config.environment import read_environment
from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.reliability.actions import Actions, Kind
from megatron_bert_tp.reliability.board import board_of_host
from megatron_bert_tp.reliability.limits import Limits
from megatron_bert_tp.reliability.signals import StopRequests
from megatron_bert_tp.reliability.watchdog import Watchdog

LIMITS = Limits(step=2.0, long=60.0)


def main() -> None:
    what, environment = sys.argv[1], read_environment()
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    agreement = Agreement.of_world(timedelta(seconds=120))
    board = board_of_host(
        agreement, local_rank=environment.local_rank, local_world_size=environment.local_world_size
    )
    with (
        StopRequests() as stops,
        Watchdog(
            board,
            LIMITS,
            on_hang=lambda text: print(f"told by {board.rank}: {text}", flush=True),
            on_orphaned=lambda: stops.request("the launcher is gone"),
            launcher=os.getppid(),
        ),
    ):
        reason = steps(Actions(board), agreement, stops, what)
    print(f"rank {board.rank} stops: {reason}", flush=True)
    sys.exit(ExitCode.STOPPED)


def steps(actions: Actions, agreement: Agreement, stops: StopRequests, what: str) -> str:
    number = torch.ones(4)
    for step in range(1, 4000):
        actions.begin_step(step)
        actions.enter(Kind.FORWARD, "forward of microbatch 0")
        if step == 5 and agreement.rank == 1:
            print("now", os.getpid(), time.time(), flush=True)
            if what == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
        actions.enter(Kind.GRADIENTS, "adds up gradients")
        dist.all_reduce(number)
        actions.enter(Kind.AGREEMENT, "whether to stop")
        if what != "never stop" and (told := agreement.first(stops.requested)) is not None:
            return told.text
        time.sleep(0.01)
    return "never"


if __name__ == "__main__":
    main()
