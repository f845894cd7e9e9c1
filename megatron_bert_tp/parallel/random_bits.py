"""Dropout masks that no layout changes: counter-based random bits named by what they mask.

The bits of one element are a pure function of (seed, layer, place, sample number, element), by the
generator Philox4x64-10 (Salmon et al. 2011), so every tensor rank, sequence slice, recomputation and resumed
run draws the same mask.  Key = (seed, 0); counter words = (element >> 4, sample, layer << 8 | place, 0); an
element uses the 16-bit lane ``element & 15`` of its block of four 64-bit words and is kept where that lane,
read as a signed number, is at least ``round(p * 65536) - 32768``.  Elements are numbered with the maximal
positions, never the padded length of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LANES = 16
_WORD = (1 << 64) - 1


class Place(IntEnum):
    """Where in a layer a mask is applied."""

    EMBEDDINGS = 0
    ATTENTION_PROBABILITIES = 1
    ATTENTION_OUTPUT = 2
    MLP_OUTPUT = 3
    CROSS_ATTENTION_PROBABILITIES = 4
    CROSS_ATTENTION_OUTPUT = 5
    CLASSIFIER = 6


@dataclass(frozen=True)
class TokenRun:
    """Some of the ``batch x sequence`` tokens of a microbatch, by their flat indices; beyond it is padding."""

    tokens: range
    sequence: int


@dataclass(frozen=True)
class RandomBits:
    """The random bits of one microbatch; ``samples`` are sample numbers counted over all epochs.

    Without ``lengths`` each sample is a row.  With them, the samples stand one behind another in a single row.
    With a ``run``, hidden states are those of a few tokens; attention has all.
    """

    seed: int
    samples: tuple[int, ...]
    lengths: tuple[int, ...] | None = None
    run: TokenRun | None = None
    _generator: np.random.Philox = field(default_factory=lambda: np.random.Philox(key=0), compare=False)

    def lanes(self, sample: int, *, layer: int, place: Place, start: int, count: int) -> NDArray[np.int16]:
        """Signed 16-bit lanes of the elements ``start`` to ``start + count`` of one sample."""
        block, skipped = divmod(start, LANES)
        # The generator increments its counter before it draws: begin one block lower.
        before = ((layer << 8 | place) << 128 | sample << 64 | block) - 1
        counter = np.array([before >> shift & _WORD for shift in (0, 64, 128, 192)], dtype=np.uint64)
        key = np.array([self.seed, 0], dtype=np.uint64)
        self._generator.state = cast(Any, _philox_state(counter, key))
        num_blocks = -(-(skipped + count) // LANES)
        lanes = self._generator.random_raw(4 * num_blocks).view(np.int16)
        return lanes[skipped : skipped + count]

    def hidden(self, layer: int, place: Place, *, positions: int, features: int) -> Tensor:
        """Lanes ``[rows, positions, features]`` for hidden states; element = position x features + feature.

        The position is that in the sample.  Those that belong to no sample, in a packed row or at the end of a
        run, are kept.  With a run there is one row of as many positions as it has tokens.
        """
        num_rows = len(self.samples) if self.lengths is None and self.run is None else 1
        run = self.run or TokenRun(range(num_rows * positions), positions)
        assert len(run.tokens) == num_rows * positions, "hidden states of other tokens than those of the run"
        drawn = np.empty((len(run.tokens), features), dtype=np.int16)
        end = 0
        for sample, own, first in self._samples_of(run):
            lanes = self.lanes(
                sample, layer=layer, place=place, start=first * features, count=len(own) * features
            )
            drawn[own.start : own.stop] = lanes.reshape(len(own), features)
            end = own.stop
        drawn[end:] = np.iinfo(np.int16).max
        return torch.from_numpy(drawn).view(num_rows, positions, features)

    def _samples_of(self, run: TokenRun) -> Iterator[tuple[int, range, int]]:
        """Number of each sample with tokens in ``run``, their places in it, and the position of the first."""
        first = run.tokens.start
        begin = 0
        for sample, length in zip(
            self.samples, self.lengths or (run.sequence,) * len(self.samples), strict=True
        ):
            start, stop = max(begin, first), min(begin + length, run.tokens.stop)
            if start < stop:
                yield sample, range(start - first, stop - first), start - begin
            begin += length

    def of_samples(self, places: Sequence[int] | None = None) -> "RandomBits":
        """The bits of the samples at ``places`` (all of them by default), each a row of its own."""
        samples = self.samples if places is None else tuple(self.samples[place] for place in places)
        return replace(self, samples=samples, lengths=None, run=None)

    def of_run(self, tokens: range, *, sequence: int) -> "RandomBits":
        """The same bits for the hidden states ``[1, tokens, hidden]`` of some flat indices in batch x sequence."""
        return replace(self, run=TokenRun(tokens, sequence))

    def attention(
        self,
        layer: int,
        *,
        heads: range,
        positions: int,
        max_positions: int,
        place: Place = Place.ATTENTION_PROBABILITIES,
    ) -> Tensor:
        """Lanes ``[samples, heads, positions, positions]`` of the global ``heads``.

        Element = (head x max_positions + query) x max_positions + key.
        """
        shape = (len(self.samples), len(heads), positions, max_positions)
        drawn = np.empty(shape, dtype=np.int16)
        for row, sample in enumerate(self.samples):
            for column, run in enumerate(_runs(heads, positions, max_positions)):
                lanes = self.lanes(sample, layer=layer, place=place, start=run.start, count=len(run))
                drawn[row].reshape(-1)[column * len(run) : (column + 1) * len(run)] = lanes
        return torch.from_numpy(drawn)[..., :positions].contiguous()


def _runs(heads: range, positions: int, max_positions: int) -> list[range]:
    """Contiguous element ranges that cover the first ``positions`` query rows of every head."""
    square = max_positions * max_positions
    if positions == max_positions:
        return [range(heads.start * square, heads.stop * square)]
    return [range(head * square, head * square + positions * max_positions) for head in heads]


def _philox_state(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> dict[str, Any]:
    return {
        "bit_generator": "Philox",
        "state": {"counter": counter, "key": key},
        "buffer": np.zeros(4, dtype=np.uint64),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }


def dropped_share(probability: float) -> float:
    """The probability as the 16-bit threshold realises it (0.1 becomes 0.100006); always below 1."""
    return _num_dropped(probability) / 65536


def keep_mask(lanes: Tensor, probability: float) -> Tensor:
    """Turn lanes (int16, overwritten) into a mask of uint8: 1 keeps, 0 drops."""
    threshold = _num_dropped(probability) - 32768
    # In place on int16 and then a cast: comparing to bool directly is ten times slower on CPU.
    return lanes.ge_(threshold).to(torch.uint8)


def _num_dropped(probability: float) -> int:
    """How many of the 65536 values of a lane drop their element."""
    dropped = round(probability * 65536)
    assert 0 <= dropped < 65536, f"a dropout probability of {probability} leaves nothing"
    return dropped


def dropped(x: Tensor, mask: Tensor, probability: float) -> Tensor:
    """``x`` where ``mask`` is 1, times 1 / (1 - p); a new tensor.

    The scale comes last: rounded to 16 bits by itself, it would be off by 0.2% for all elements alike.
    """
    return mask.to(x.dtype).mul_(x).mul_(1 / (1 - dropped_share(probability)))


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, mask: Tensor, probability: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.probability, ctx.dtype = probability, x.dtype
        kept = dropped(x, mask, probability)
        if residual is None:
            return kept
        # Under autocast the residual is float32 and x is not; the sum keeps the wider format.
        return kept.add_(residual) if residual.dtype == x.dtype else residual + kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (mask,) = ctx.saved_tensors
        grad = dropped(grads[0], mask, ctx.probability).to(ctx.dtype)
        return grad, grads[0] if ctx.needs_input_grad[1] else None, None, None


def dropout_add(
    x: Tensor, residual: Tensor | None, bits: RandomBits | None, *, probability: float, layer: int, place: Place
) -> Tensor:
    """``residual + dropout(x)`` for hidden states ``[samples, positions, features]``; no bits, no dropout."""
    if bits is None or dropped_share(probability) == 0:
        return x if residual is None else residual + x
    lanes = bits.hidden(layer, place, positions=x.shape[1], features=x.shape[2])
    mask = keep_mask(lanes, probability).to(x.device, non_blocking=True)
    result: Tensor = _DropoutAdd.apply(x, residual, mask, probability)
    return result
