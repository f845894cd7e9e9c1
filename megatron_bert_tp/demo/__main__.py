"""`python -m megatron_bert_tp.demo`: raw text in, a trained MegatronBert in Hugging Face's format out."""

import subprocess
import sys
from pathlib import Path

from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.errors import TrainingError

USAGE = """\
usage: python -m megatron_bert_tp.demo

Builds a corpus from the docstrings on this machine, trains a small MegatronBert on it as tensor 2 x pipeline 2
(4 processes), exports it and fills a few [MASK]s.  Everything lies in runs/demo; start it in the repository.
"""
CONFIG = Path("configs/demo.yaml")


def main(_arguments: list[str]) -> None:
    """All steps; each says what it does, and the last lines say where everything is."""
    # Here, not above: `--help` needs no torch.
    from megatron_bert_tp.demo.steps import export, fill_masks, make_data, picture, summary

    print("1/6 corpus, vocabulary and tokens", flush=True)
    make_data()
    print(f"\n4/6 training: torchrun --nproc_per_node=4 -m megatron_bert_tp.pretrain {CONFIG}", flush=True)
    _train()
    print("\n5/6 export to one Hugging Face directory", flush=True)
    export()
    print("\n6/6 a few [MASK]s filled by the exported weights, and the loss curve", flush=True)
    fill_masks()
    picture()
    print(summary(), flush=True)


def _train() -> None:
    # torchrun by its module, so that it is this environment's; standalone, so that it takes a free port.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node=4", "-m", "megatron_bert_tp.pretrain", str(CONFIG)]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise TrainingError(f"training ended with exit code {code}; its own message stands above")


if __name__ == "__main__":
    sys.exit(run_command(main, usage=USAGE))
