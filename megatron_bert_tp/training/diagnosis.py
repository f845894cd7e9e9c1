"""Where the numbers of a step first went wrong: the step is computed again, and every tensor is looked at.

A step is a function of weights and sample numbers alone: dropout bits have names, and the weights have not moved.
So it goes wrong again in the same place, unless a device or its memory has failed; and that is told too.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.linear import RowParallelLinear
from megatron_bert_tp.parallel.sharding import Part
from megatron_bert_tp.pipeline.executor import Criterion
from megatron_bert_tp.training.anomalies import Attribution, Origin, What

Key = tuple[int, ...]
"""Place in the order of computation: phase, microbatch, stage, place in the stage, and what comes first there."""
_PARAMETERS, _FORWARD, _BACKWARD = range(3)
_STAGE_INPUT, _LOSS = -1, 1 << 30  # places before and behind all modules of a stage


@dataclass(frozen=True)
class Seen:
    """What one rank has found first."""

    key: Key
    what: What
    name: str
    value: Literal["nan", "inf"]
    microbatch: int | None

    def dump(self) -> str:
        """As text for the other ranks."""
        return json.dumps([self.key, self.what.name, self.name, self.value, self.microbatch])

    @classmethod
    def read(cls, text: str) -> "Seen":
        """What `dump` wrote."""
        key, what, name, value, microbatch = json.loads(text)
        return cls(tuple(key), What[what], name, value, microbatch)


@dataclass(frozen=True)
class _Pass:
    """A forward pass of one microbatch through one stage."""

    microbatch: int
    stage: int


class Watch:
    """Looks at all that the stages of this rank compute in a step, and keeps the first that is not finite.

    ``stages`` are the numbers of the stages in the whole pipeline, ``batches`` the microbatches of the step.
    """

    def __init__(self, chunks: Chunks, stages: Sequence[int], batches: Sequence[Batch]) -> None:
        self._chunks, self._stages = chunks, stages
        self._microbatches = {id(batch): number for number, batch in enumerate(batches)}
        self.first: Seen | None = None
        self._pass: _Pass | None = None
        self._place = 0
        self._places: dict[int, int] = {}
        self._last: Tensor | None = None
        self._num_gradients: dict[int, int] = {}

    def look_at_parameters(self) -> None:
        """Whether the weights themselves are not finite."""
        for stage, module in zip(self._stages, self._chunks, strict=True):
            for place, part in enumerate(module.parts()):
                key = (_PARAMETERS, 0, stage, place, 0)
                self._look(part.view(part.parameter.detach()), key, what=What.PARAMETER, name=part.name)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Inside, every output and every gradient is looked at."""
        with ExitStack() as stack:
            for stage, module in zip(self._stages, self._chunks, strict=True):
                self._listen(stack, stage, module)
            yield
        self._pass = self._last = None

    def of_loss(self, criterion: Criterion[Batch]) -> Criterion[Batch]:
        """The criterion, looked at too."""

        def watched(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
            loss, statistics = criterion(output, batch)
            key = (_FORWARD, self._microbatches[id(batch)], max(self._stages), _LOSS, 0)
            self._look(loss.detach(), key, what=What.LOSS, name="the model")
            return loss, statistics

        return watched

    def _listen(self, stack: ExitStack, stage: int, module: MegatronBertStage) -> None:
        def hold(handle: RemovableHandle) -> None:
            stack.callback(handle.remove)

        hold(module.register_forward_pre_hook(partial(self._begin, stage)))
        owners = {id(p): m for m in module.modules() for p in m.parameters(recurse=False)}
        parts: dict[int, list[Part]] = {}
        for part in module.parts():
            parts.setdefault(id(part.parameter), []).append(part)
        for name, inner in module.named_modules():
            hold(inner.register_forward_hook(partial(self._end if inner is module else self._output, name)))
        given = {}
        for parameter in module.parameters():
            take = partial(self._of_parameter, stage, owners[id(parameter)], parts[id(parameter)])
            given[id(parameter)] = take
            if parameter.requires_grad:
                hold(parameter.register_hook(take))
        stack.callback(setattr, module.weight_gradients, "deliver", module.weight_gradients.deliver)
        module.weight_gradients.deliver = _watched(module.weight_gradients.deliver, given)

    def _begin(self, stage: int, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        received, batch = arguments
        self._pass, self._place = _Pass(self._microbatches[id(batch)], stage), 0
        if received is not None:
            key = (_FORWARD, self._pass.microbatch, stage, _STAGE_INPUT, 0)
            self._look(received.detach(), key, what=What.RECEIVED, name=f"stage {stage}")

    def _end(self, name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._output(name or "the stage", module, arguments, output)
        self._pass = self._last = None

    def _output(self, name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        passed = self._pass
        if passed is None:
            return  # computed again in the backward: its first time was looked at
        self._place += 1
        self._places[id(module)] = self._place
        for tensor in _tensors_of(output):
            key = (_FORWARD, passed.microbatch, passed.stage, self._place, 0)
            if self._is_new(tensor.detach(), key):
                key = (*key[:-1], int(_has_received(module, arguments)))
                self._look(tensor.detach(), key, what=What.OUTPUT, name=name)
            # The output of a module is often that of its last part, whose name says more.
            if tensor.requires_grad and tensor is not self._last:
                tensor.register_hook(partial(self._of_output, passed, self._place, name))
            self._last = tensor

    def _of_output(self, passed: _Pass, place: int, name: str, gradient: Tensor) -> None:
        key = (_BACKWARD, passed.microbatch, -passed.stage, -place, 0)
        self._look(gradient, key, what=What.OUTPUT_GRADIENT, name=name)

    def _of_parameter(
        self, stage: int, owner: nn.Module, parts: Sequence[Part], gradient: Tensor | None
    ) -> None:
        """The gradient of one microbatch; backwards of a stage run in the order of microbatches."""
        if gradient is None:
            return  # put off
        microbatch = self._num_gradients.get(id(parts[0].parameter), 0)
        self._num_gradients[id(parts[0].parameter)] = microbatch + 1
        key = (_BACKWARD, microbatch, -stage, -self._places.get(id(owner), 0), 1)
        for part in parts:
            self._look(part.view(gradient), key, what=What.PARAMETER_GRADIENT, name=part.name)

    def _is_new(self, tensor: Tensor, key: Key) -> bool:
        """Whether ``tensor`` is not finite, and comes before all that was."""
        if self.first is not None and self.first.key <= key:
            return False
        return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())

    def _look(self, tensor: Tensor, key: Key, *, what: What, name: str) -> None:
        if self._is_new(tensor, key):
            value: Literal["nan", "inf"] = "nan" if bool(torch.isnan(tensor).any()) else "inf"
            self.first = Seen(key, what, name, value, None if what is What.PARAMETER else key[1])


def attribute(
    watch: Watch,
    replay: Callable[[], bool],
    batches: Sequence[Batch],
    agreement: Agreement,
    *,
    tensors: Mapping[str, float | None],
) -> Attribution:
    """Where a step first went wrong, the same on every rank; every rank must call it.

    ``replay`` computes the step again and says whether loss and norm are finite, the same on all ranks.
    """
    watch.look_at_parameters()
    recurs = True
    if agreement.first(None if watch.first is None else watch.first.name) is None:
        with watch.hooks():
            recurs = not replay()
    told = agreement.texts(None if watch.first is None else watch.first.dump())
    found = {rank: Seen.read(text) for rank, text in enumerate(told) if text is not None}
    if not found:
        return Attribution(tensors, recurs=recurs)
    first = min(found.values(), key=lambda seen: seen.key)
    ranks = tuple(rank for rank, seen in found.items() if seen == first)
    own: tuple[int, ...] = ()
    if first.microbatch is not None and agreement.rank in ranks:
        own = batches[first.microbatch].sample_numbers
    samples = _joined(own, agreement)
    origin = Origin(first.what, first.name, first.value, ranks, first.microbatch, samples)
    return Attribution(tensors, origin, recurs)


def _joined(own: Sequence[int], agreement: Agreement) -> tuple[int, ...]:
    """The different numbers of all ranks, ascending."""
    (most,) = agreement.maximum([len(own)])
    rows = agreement.gathered([*own, *[-1] * (most - len(own))]) if most else []
    return tuple(sorted({int(number) for row in rows for number in row if number >= 0}))


def _has_received(module: nn.Module, arguments: tuple[Any, ...]) -> bool:
    """Whether an output is wrong only because another tensor rank's term of the sum is."""
    if not isinstance(module, RowParallelLinear) or module.axis.size == 1:
        return False
    with torch.no_grad():
        return bool(torch.isfinite(F.linear(arguments[0], module.weight)).all())


def _watched(
    deliver: Callable[[nn.Parameter, Tensor], None], given: Mapping[int, Callable[[Tensor], None]]
) -> Callable[[nn.Parameter, Tensor], None]:
    """``deliver`` of gradients that were put off, which never reach the hooks of autograd."""

    def take(parameter: nn.Parameter, gradient: Tensor) -> None:
        given[id(parameter)](gradient)
        deliver(parameter, gradient)

    return take


def _tensors_of(output: Any) -> Iterator[Tensor]:
    """All tensors of what a module returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors_of(each)
    elif is_dataclass(output) and not isinstance(output, type):
        for each in fields(output):
            yield from _tensors_of(getattr(output, each.name))
