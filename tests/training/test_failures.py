"""What happens around a run: a process that vanishes ends it."""

import os
import re
import subprocess
import sys
import time

from tests.training.runs import ROOT, records

# The second of two pipeline stages kills itself at the beginning of its third step.
SCRIPT = """\
import os, signal, sys, time
from megatron_bert_tp.pretrain import main
from megatron_bert_tp.training.trainer import Trainer

train_step = Trainer.train_step

def vanish(self):
    if os.environ["RANK"] == "1" and self.steps_done == 2:
        print("killed at", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self)

Trainer.train_step = vanish
main(sys.argv[1:])
"""


def test_a_killed_rank_ends_the_run_quickly_and_with_an_error(data, tmp_path):
    script = tmp_path / "vanish.py"
    script.write_text(SCRIPT, encoding="utf-8")
    arguments = [data, f"run.directory={tmp_path}/run", "parallel.pipeline=2", "run.timeout_seconds=150"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    (killed,) = re.findall(r"^killed at ([\d.]+)$", done.stdout, re.MULTILINE)
    # Far below the 150 s for which the other rank waits for a message.
    assert time.time() - float(killed) < 60
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "exitcode: -9" in done.stderr
    assert [row["step"] for row in records(tmp_path / "run", "step")] == [1, 2]
    assert not (tmp_path / "run" / "checkpoints").exists()
