"""`python -m megatron_bert_tp.finetune CONFIG.yaml section.key=value ...`: fine-tuning, also under torchrun."""

import sys

from megatron_bert_tp.config.command_line import run_command, task_from_arguments
from megatron_bert_tp.config.environment import read_environment
from megatron_bert_tp.config.help import settings_help
from megatron_bert_tp.config.task_schema import TaskRun

USAGE = """\
usage: [torchrun --nproc_per_node=N -m | python -m] megatron_bert_tp.finetune CONFIG.yaml [section.key=value ...]

Fine-tunes a MegatronBert on a task, on tensor x pipeline x data ranks, keeps the best checkpoint, and writes it
as a Hugging Face directory with its predictions.  Settings come from the YAML file (configs/finetune has one for
each task); section.key=value overrides one of them.
"""


def main(arguments: list[str]) -> None:
    """Check the settings first, which takes no torch, and then train."""
    config = task_from_arguments(arguments, USAGE)

    from torch.distributed.elastic.multiprocessing.errors import record

    from megatron_bert_tp.training.failures import Recorder
    from megatron_bert_tp.training.finetuning import finetune

    # torchrun reads the cause of a failure from the file that `record` writes.
    record(finetune, Recorder())(config, read_environment())


if __name__ == "__main__":
    sys.exit(run_command(main, usage=f"{USAGE}\n{settings_help(TaskRun)}"))
