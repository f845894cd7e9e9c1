"""The global batch as a function of the samples done: constant, or growing in equal steps at first."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchRamp:
    """Batches of ``start`` samples at first, ``increment`` more at equal distances within ``samples``."""

    start: int
    increment: int
    samples: int


@dataclass(frozen=True)
class BatchSize:
    """Samples per optimizer step: ``full``, or up to it along a ramp (Megatron-LM's ``--rampup-batch-size``)."""

    full: int
    ramp: BatchRamp | None = None

    def global_batch_at(self, samples_done: int) -> int:
        """Size of the step that follows ``samples_done`` samples."""
        if self.ramp is None or samples_done >= self.ramp.samples:
            return self.full
        # In integers: floats would put a sample just at a boundary on either side of it.
        level = samples_done * self._num_increments(self.ramp) // self.ramp.samples
        return self.ramp.start + level * self.ramp.increment

    def samples_after(self, num_steps: int, *, samples_done: int = 0) -> int:
        """Samples done after ``num_steps`` more steps."""
        if self.ramp is not None:
            while num_steps and samples_done < self.ramp.samples:
                batch = self.global_batch_at(samples_done)
                # All steps of one level at once: a ramp may be as long as the run.
                level_ends = self._end_of_level(samples_done, self.ramp)
                taken = min(num_steps, -(-(level_ends - samples_done) // batch))
                samples_done += taken * batch
                num_steps -= taken
        return samples_done + num_steps * self.full

    def _num_increments(self, ramp: BatchRamp) -> int:
        return (self.full - ramp.start) // ramp.increment

    def _end_of_level(self, samples_done: int, ramp: BatchRamp) -> int:
        """First number of samples at which the batch is larger."""
        increments = self._num_increments(ramp)
        level = samples_done * increments // ramp.samples
        return -(-(level + 1) * ramp.samples // increments)
