"""A job of SLURM puts itself back into the queue."""

import subprocess

from megatron_bert_tp.errors import TrainingError

_SECONDS = 60.0


def requeue(job: str | None) -> str:
    """Have SLURM run ``job`` once more, and end this run of it at once; returns a line that tells so.

    Call it on one rank, when all that must be kept is on disk: SLURM ends the job's processes within its
    ``KillWait``.  ``job`` is what SLURM calls the job, None outside of one.  Errors: `TrainingError`.
    """
    if job is None:
        raise TrainingError(
            "run.requeue is true, but this is no job of SLURM (SLURM_JOB_ID is not set): nothing runs it again; "
            "start it with sbatch launch/slurm.sbatch, or leave run.requeue out"
        )
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError as error:
        raise TrainingError(f"job {job} cannot be requeued: there is no scontrol here; {_by_hand(job)}") from error
    except subprocess.TimeoutExpired as error:
        raise TrainingError(
            f"job {job} cannot be requeued: scontrol has not answered for {_SECONDS:g} s; {_by_hand(job)}"
        ) from error
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())[:500] or f"exit code {done.returncode}"
        raise TrainingError(
            f"job {job} cannot be requeued: {reason}; submit it with sbatch --requeue, or {_by_hand(job)}"
        )
    return f"SLURM has put job {job} back into its queue"


def _by_hand(job: str) -> str:
    return f"put it back yourself: scontrol requeue {job}, or sbatch with the same command"
