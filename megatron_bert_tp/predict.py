"""`python -m megatron_bert_tp.predict`: text in, JSON lines out, with a model of any class."""

import sys
from contextlib import ExitStack
from datetime import timedelta

from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.config.environment import read_environment
from megatron_bert_tp.prediction.arguments import Options, check_processes, parser

PATIENCE = timedelta(days=7)
"""How long the other ranks wait for the next batch; whoever types the lines may pause."""


def main(arguments: list[str]) -> None:
    """Check the arguments first, which takes no torch; then read, compute and write."""
    given = parser().parse_args(arguments)
    environment = read_environment()
    check_processes(environment.world_size, given.tensor)
    options = Options.of(given.task, vars(given))

    # Here, not above: `--help` needs no torch.
    import torch

    from megatron_bert_tp.prediction.predictor import Predictor
    from megatron_bert_tp.prediction.stream import answer_stream, opened_sink, opened_source
    from megatron_bert_tp.prediction.tasks import TASKS
    from megatron_bert_tp.training.failures import Ending, telling
    from megatron_bert_tp.training.processes import build_mesh, choose_device, process_group

    device = choose_device(given.device, environment.local_rank, option="--device")
    with ExitStack() as stack:
        stack.enter_context(process_group(environment, device, PATIENCE))
        stack.enter_context(telling(Ending(environment)))
        mesh = build_mesh(environment, device, tensor=given.tensor, pipeline=1, ends=(0,), timeout=PATIENCE)
        form = TASKS[given.task].form
        source = stack.enter_context(opened_source(given.input, form)) if environment.is_first else None
        predictor = Predictor.open(
            given.model,
            given.task,
            options=options,
            batch_size=given.batch,
            mesh=mesh,
            device=device,
            dtype=None if given.dtype is None else getattr(torch, given.dtype),
        )
        if source is None:
            predictor.follow()
            return
        sink = stack.enter_context(opened_sink(given.output, source=source))
        answer_stream(predictor, source, sink)


if __name__ == "__main__":
    sys.exit(run_command(main, usage=parser().format_help()))
