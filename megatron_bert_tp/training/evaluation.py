"""What is measured beside training, and what follows from it; pretraining's is here."""

from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.objectives.pretraining import Counts, Losses, count
from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.training.progress import Record
from megatron_bert_tp.training.texts import Texts
from megatron_bert_tp.training.trainer import Trainer


@dataclass(frozen=True)
class Measured:
    """An evaluation, the same on all ranks; ``is_best`` asks for a checkpoint that stays."""

    record: Record
    is_best: bool = False


class Evaluation(Protocol):
    """What a loop asks of evaluations."""

    @property
    def is_over(self) -> bool:
        """Whether they say that training on is of no use."""

    def is_due(self, steps_done: int) -> bool:
        """Whether there is one after so many steps."""

    def counts(self, record: Record) -> bool:
        """Whether an evaluation on record is as this one would be."""

    def measure(self, trainer: Trainer) -> Measured:
        """Measure the weights as they are; every rank calls it."""

    def settle(self, *, is_saved: bool) -> None:
        """Hear whether there is a checkpoint of the best evaluation, which was just measured."""


class HeldOut:
    """Losses of pretraining on the held-out part: the same samples and masks every time, without dropout."""

    is_over = False

    def __init__(self, texts: Texts, *, num_samples: int, every: int, last_step: int) -> None:
        """``num_samples`` of each evaluation, ``every`` so many steps and after the last one."""
        self._texts, self._num_samples = texts, num_samples
        self._every, self._last_step = every, last_step
        self._batches: list[Batch] | None = None

    def is_due(self, steps_done: int) -> bool:
        """Whether the step just done is one after which the held-out part is looked at."""
        if self._texts.validation is None:
            return False
        return steps_done % self._every == 0 or steps_done == self._last_step

    def counts(self, _record: Record) -> bool:
        """Always: the held-out part is that of the training data, which stay the same."""
        return True

    def measure(self, trainer: Trainer) -> Measured:
        """Losses, and after the last step also what word frequencies alone would get."""
        losses, counts = self.losses(trainer)
        record: Record = {"step": trainer.steps_done, "loss": losses.loss, **asdict(losses)}
        record = {**record, "masked": counts.masked}
        if trainer.steps_done == self._last_step:
            record = {**record, "unigram_loss": self.unigram_loss(trainer, counts)}
        return Measured(record)

    def settle(self, *, is_saved: bool) -> None:
        """None is the best."""

    def losses(self, trainer: Trainer) -> tuple[Losses, Counts]:
        """Losses and labels over all data ranks."""
        losses, counts = trainer.measure(self._held_out(trainer.device))
        assert isinstance(losses, Losses), "the trainer's objective is pretraining's"
        assert isinstance(counts, Counts)
        return losses, counts

    def unigram_loss(self, trainer: Trainer, counts: Counts) -> float:
        """What a model of word frequencies alone gets on the same targets, over all data ranks."""
        batches, device = self._held_out(trainer.device), trainer.device
        own = count(batches, Axis.alone("data"), device).masked

        def advance() -> None:
            trainer.pipeline.actions.enter(Kind.EVALUATION, "counts the tokens of the training part")

        loss = self._texts.unigram_loss(batches, advance=advance) if own else 0.0
        total = torch.tensor([loss * own], dtype=torch.float64, device=device)
        return sum_over_(total, trainer.mesh.data).item() / max(1, counts.masked)

    def _held_out(self, device: torch.device) -> list[Batch]:
        if self._batches is None:
            assert self._texts.validation is not None, "nothing is evaluated without a validation part"
            batches = self._texts.validation.evaluation(self._num_samples)
            self._batches = [batch.to(device) for batch in batches]
        return self._batches
