"""Calls of the family's classes on this rank, and the way the answers of all ranks become one.

The worker processes import this file: it must not import `transformers`.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_bert_tp
from megatron_bert_tp.parallel.mesh import ParallelMesh
from tests.comparison import Piece, gradient_pieces, join, relative_errors
from tests.golden.formula import scalar
from tests.support import Layout, build_mesh

PLAIN_OUTPUTS = (
    "logits", "prediction_logits", "seq_relationship_logits", "start_logits", "end_logits", "last_hidden_state",
    "pooler_output",
)  # fmt: skip
LISTED_OUTPUTS = ("hidden_states", "attentions", "cross_attentions")


@dataclass(frozen=True)
class Call:
    """Arguments of one forward; with ``has_gradients`` a backward follows, also to the inputs ``differentiable``.

    Floating inputs are cast to the model's dtype.
    """

    inputs: Mapping[str, Tensor]
    switches: Mapping[str, Any] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    has_gradients: bool = True
    is_training: bool = False


@dataclass(frozen=True)
class Answer:
    """What a call gives: outputs by name (``attentions.0``), gradients of inputs and of parameters."""

    outputs: dict[str, Tensor]
    input_gradients: dict[str, Tensor]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class RankAnswer:
    """An `Answer` of one rank, the gradients of its parameters in pieces."""

    outputs: dict[str, Tensor]
    input_gradients: dict[str, Tensor]
    pieces: list[Piece]


def prepared(call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fresh copies of the inputs."""
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in call.inputs.items()}
    return {k: v.clone().requires_grad_(k in call.differentiable) for k, v in cast.items()}


def plain_outputs(output: object) -> dict[str, Tensor]:
    """Outputs that are one tensor, the loss left out."""
    named = ((name, getattr(output, name, None)) for name in PLAIN_OUTPUTS)
    return {name: value for name, value in named if value is not None}


def all_outputs(output: object) -> dict[str, Tensor]:
    """Every tensor of an output: ``loss``, the plain ones, and those of each layer."""
    found = {k: v.detach() for k, v in plain_outputs(output).items()}
    if getattr(output, "loss", None) is not None:
        found["loss"] = output.loss.detach()
    for name in LISTED_OUTPUTS:
        values = getattr(output, name, None) or ()
        found |= {f"{name}.{place}": value.detach() for place, value in enumerate(values)}
    return {name: value.clone() for name, value in found.items()}


def objective_of(output: object) -> Tensor:
    """The loss, or where there is none a sum to which every output element adds."""
    loss = getattr(output, "loss", None)
    return loss if loss is not None else scalar(plain_outputs(output))


def make_call(model: torch.nn.Module, call: Call, dtype: torch.dtype) -> RankAnswer:
    inputs = prepared(call, dtype)
    model.train(call.is_training)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(call.has_gradients):
        output = model(**inputs, **call.switches)
    if call.has_gradients:
        objective_of(output).backward()
    # A gradient that was never computed counts as zero on both sides.
    gradients = {k: _gradient(inputs[k]) for k in call.differentiable if call.has_gradients}
    return RankAnswer(all_outputs(output), gradients, gradient_pieces(model.parts()))


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def load(architecture: str, directory: Path, mesh: ParallelMesh | None, dtype: torch.dtype) -> torch.nn.Module:
    return getattr(megatron_bert_tp, architecture).from_pretrained(directory, mesh=mesh, dtype=dtype)


def mesh_of(size: int) -> ParallelMesh | None:
    """Mesh of this rank; one process goes without mesh and process group."""
    if size == 1:
        return None
    mesh = build_mesh(Layout(tensor=size))
    # A rank that is refused at once must not leave while others still connect to it.
    dist.barrier()
    return mesh


def guarded(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Result, or the text of the exception: one failing call must not hide the others."""
    try:
        return function(*arguments, **named)
    except Exception:
        return traceback.format_exc()


def on_ranks(ranks: Any, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of ``function(size, *arguments)``; a single process is this one."""
    if size == 1:
        return [function(1, *arguments)]
    return ranks.run(size, function, size, *arguments)


def joined(answers: Sequence[RankAnswer | str]) -> Answer | str:
    """One answer of all ranks, which must agree to the bit in outputs and gradients of inputs."""
    failures = [answer for answer in answers if isinstance(answer, str)]
    if failures:
        return failures[0]
    first = answers[0]
    for other in answers[1:]:
        assert_equal(first.outputs, other.outputs)
        assert_equal(first.input_gradients, other.input_gradients)
    gradients = join(piece for answer in answers for piece in answer.pieces)
    return Answer(first.outputs, first.input_gradients, gradients)


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    unequal = [k for k in one if not torch.equal(one[k], other[k])]
    assert unequal == [], f"ranks differ in {unequal}"


@dataclass(frozen=True)
class Bounds:
    """Largest errors: absolute of outputs, relative of gradients (`comparison.relative_errors`).

    ``idle`` bounds gradients that are zero in exact arithmetic, as a share of the largest gradient.
    """

    outputs: float
    gradients: float
    idle: float


def idle_gradients(gradients: Mapping[str, Tensor]) -> frozenset[str]:
    """Names whose float64 gradients are rounding noise, or nothing.

    Softmax ignores what is added to all its inputs: key biases, where keys meet no distances; the bias that all
    choices or all positions have in common.  And some calls use no word embeddings.
    """
    limit = 1e-12 * max((1.0, *(value.abs().max().item() for value in gradients.values())))
    return frozenset(name for name, value in gradients.items() if value.abs().max() < limit)


def differences(found: Answer | str, truth: Answer, bounds: Bounds, idle: frozenset[str]) -> list[str]:
    """What is further from the truth than the bounds allow, one line each."""
    if isinstance(found, str):
        return [found]
    told = _output_differences(found.outputs, truth.outputs, bounds.outputs)
    told += _gradient_differences(found.input_gradients, truth.input_gradients, bounds.gradients)
    alive = [{k: v for k, v in each.gradients.items() if k not in idle} for each in (found, truth)]
    told += _gradient_differences(*alive, bounds.gradients)
    return told + _idle_differences(found.gradients, truth.gradients, idle, bounds.idle)


def _idle_differences(
    found: Mapping[str, Tensor], truth: Mapping[str, Tensor], idle: frozenset[str], bound: float
) -> list[str]:
    limit = bound * max((1.0, *(value.abs().max().item() for value in truth.values())))
    noise = {name: found[name].abs().max().item() for name in sorted(idle & found.keys())}
    loud = {name: size for name, size in noise.items() if not size < limit}
    return [f"gradient of {name}: {size:.1e}, zero in exact arithmetic" for name, size in loud.items()]


def _output_differences(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], bound: float) -> list[str]:
    told = _name_differences(found, truth, "output")
    for name in found.keys() & truth.keys():
        if found[name].shape != truth[name].shape:
            told.append(f"output {name}: shape {tuple(found[name].shape)}, not {tuple(truth[name].shape)}")
        elif not (error := (found[name].double() - truth[name].double()).abs().max().item()) < bound:
            told.append(f"output {name}: off by {error:.1e}")
    return told


def _gradient_differences(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], bound: float) -> list[str]:
    shared = found.keys() & truth.keys()
    told = _name_differences(found, truth, "gradient")
    told += [
        f"gradient of {name}: shape {tuple(found[name].shape)}, not {tuple(truth[name].shape)}"
        for name in shared
        if found[name].shape != truth[name].shape
    ]
    if told or not shared:
        return told
    errors = relative_errors({k: found[k] for k in shared}, {k: truth[k] for k in shared})
    wrong = {name: error for name, error in errors.items() if not error < bound}
    if not wrong:
        return []
    worst = max(wrong, key=lambda name: wrong[name])
    return [f"{len(wrong)} of {len(errors)} gradients, the worst of {worst}: off by {wrong[worst]:.1e} of it"]


def _name_differences(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], kind: str) -> list[str]:
    told = [f"{kind} {name} is missing" for name in sorted(truth.keys() - found.keys())]
    return told + [f"{kind} {name} is too many" for name in sorted(found.keys() - truth.keys())]
