"""What looks after a run while it trains: hangs, slow ranks, equal replicas, stops."""

from dataclasses import dataclass

from megatron_bert_tp.config.schema import RunConfig
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.reliability.actions import Actions
from megatron_bert_tp.reliability.limits import Limits, step_limit
from megatron_bert_tp.reliability.watchdog import Watchdog
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

    def expect_steps_of(self, median_seconds: float) -> None:
        """Let the watchdog know how long a step usually takes."""
        longest = self.run.timeout_seconds
        step = step_limit(self.run.step_timeout_seconds, median_seconds, longest=longest)
        self.watchdog.limits = Limits(step=step, long=longest)

    def look_after(self, trainer: Trainer) -> list[str]:
        """What is due after a step; gives lines to tell."""
        del trainer
        return []
