"""`python -m megatron_bert_tp.pretrain CONFIG.yaml section.key=value ...`: pretraining, also under torchrun."""

import sys

from megatron_bert_tp.config.command_line import config_from_arguments, run_command
from megatron_bert_tp.config.environment import read_environment
from megatron_bert_tp.config.help import settings_help
from megatron_bert_tp.config.schema import Config

USAGE = """\
usage: [torchrun --nproc_per_node=N -m | python -m] megatron_bert_tp.pretrain CONFIG.yaml [section.key=value ...]

Pretrains a MegatronBert (masked language model and next sentence prediction) on tensor x pipeline x data
ranks.  Settings come from the YAML file; section.key=value overrides one of them.
"""


def main(arguments: list[str]) -> None:
    """Check the settings first, which takes no torch, and then train."""
    config = config_from_arguments(arguments, USAGE)

    from torch.distributed.elastic.multiprocessing.errors import record

    from megatron_bert_tp.training.failures import Recorder
    from megatron_bert_tp.training.pretraining import pretrain

    # torchrun reads the cause of a failure from the file that `record` writes.
    record(pretrain, Recorder())(config, read_environment())


if __name__ == "__main__":
    sys.exit(run_command(main, usage=f"{USAGE}\n{settings_help(Config)}"))
