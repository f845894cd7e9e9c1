"""`python -m megatron_bert_tp.evaluate CONFIG.yaml section.key=value ...`: a model measured on a task."""

import sys

from megatron_bert_tp.config.command_line import run_command, task_from_arguments
from megatron_bert_tp.config.environment import read_environment
from megatron_bert_tp.config.help import settings_help
from megatron_bert_tp.config.task_schema import TaskRun

USAGE = """\
usage: [torchrun --nproc_per_node=N -m | python -m] megatron_bert_tp.evaluate CONFIG.yaml [section.key=value ...]

Measures a model that was fine-tuned on a task (model.weights) on data.validation, predicts data.test, and writes
metrics, predictions and files for benchmarks into run.directory.  Settings are those of fine-tuning.
"""


def main(arguments: list[str]) -> None:
    """Check the settings first, which takes no torch, and then measure."""
    config = task_from_arguments(arguments, USAGE, purpose="evaluate")

    from torch.distributed.elastic.multiprocessing.errors import record

    from megatron_bert_tp.training.evaluating import evaluate
    from megatron_bert_tp.training.failures import Recorder

    record(evaluate, Recorder())(config, read_environment())


if __name__ == "__main__":
    sys.exit(run_command(main, usage=f"{USAGE}\n{settings_help(TaskRun)}"))
