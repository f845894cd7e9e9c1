"""What looks after a run while it trains: hangs, slow ranks, equal replicas, stops."""

from dataclasses import dataclass, field

from megatron_bert_tp.config.schema import RunConfig
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.reliability.actions import Actions, Kind
from megatron_bert_tp.reliability.limits import Limits, step_limit
from megatron_bert_tp.reliability.stragglers import Speed, StepTimes, Stragglers
from megatron_bert_tp.reliability.watchdog import Watchdog
from megatron_bert_tp.training.replicas import check_replicas
from megatron_bert_tp.training.stopping import Stopping
from megatron_bert_tp.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """Everything beside the training itself that happens between two steps."""

    run: RunConfig
    actions: Actions
    agreement: Agreement
    stopping: Stopping
    watchdog: Watchdog
    stragglers: Stragglers = field(default_factory=Stragglers)
    times: StepTimes = field(default_factory=StepTimes)

    def expect_steps_of(self, median_seconds: float) -> None:
        """Let the watchdog know how long a step usually takes."""
        longest = self.run.timeout_seconds
        step = step_limit(self.run.step_timeout_seconds, median_seconds, longest=longest)
        self.watchdog.limits = Limits(step=step, long=longest)

    def compare_replicas(self, trainer: Trainer) -> None:
        """RanksDifferError, on all ranks, where ranks that hold the same values differ; every rank calls it."""
        self.actions.enter(Kind.AGREEMENT, f"compares parameters after step {trainer.steps_done}")
        check_replicas(trainer.chunks, trainer.updater, trainer.mesh, self.agreement)

    def check_before_save(self, trainer: Trainer) -> None:
        """As `compare_replicas`, unless the user has switched that off."""
        if self.run.check_replicas_every:
            self.compare_replicas(trainer)

    def look_after(self, trainer: Trainer, *, is_saved: bool) -> list[str]:
        """What is due after a step; every rank must call it.  Gives a line for each rank that is slow.

        Replicas are compared when it is time, and before they are saved: a checkpoint follows a good comparison.
        """
        self.times.add(self.actions.take_seconds())
        every = self.run.check_replicas_every
        if _is_due(every, trainer.steps_done) or (every and is_saved):
            self.compare_replicas(trainer)
        if not _is_due(self.run.stragglers_every, trainer.steps_done):
            return []
        self.actions.enter(Kind.AGREEMENT, f"compares times after step {trainer.steps_done}")
        rows = self.agreement.gathered(self.times.take())
        # Ranks are laid out by their place on the pipeline first.
        ranks_of_place = trainer.mesh.data.size * trainer.mesh.tensor.size
        speeds = [Speed.of(rank, rank // ranks_of_place, numbers) for rank, numbers in enumerate(rows)]
        return [straggler.line for straggler in self.stragglers.report(speeds)]


def _is_due(every: int, steps_done: int) -> bool:
    return every > 0 and steps_done % every == 0
