"""The same calls of `transformers` 5: the independent truth.  The worker processes do not import this file."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from tests.family.cases import BASE, CAUSAL, ODD, Setup
from tests.family.passes import Answer, Call, all_outputs, objective_of, prepared
from tests.golden.formula import weight
from tests.support import IGNORED

logging.disable_progress_bar()
TIED_BIAS = "cls.predictions.decoder.bias"


@dataclass(frozen=True)
class Reference:
    """Where the models of one class are saved, and what `transformers` answers by setup and call."""

    directory: Path
    answers: dict[torch.dtype, dict[tuple[str, str], Answer]]


def build(architecture: str, settings: dict[str, object]) -> nn.Module:
    """Model in float64 with random numbers in every tensor, in evaluation mode."""
    config = transformers.MegatronBertConfig(**{**ODD, **settings})
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager")
    model = model.to(torch.float64).eval()
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            parameter.copy_(weight(name, tuple(parameter.shape)))
        if not config.tie_word_embeddings:
            # transformers 5 unties the two names of this bias too, and leaves the first one without use.
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
    return model


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the model computes with, under the names of this package's tensors."""
    prefix = "bert." if type(model).__name__ == BASE else ""
    named = {prefix + name: parameter for name, parameter in model.named_parameters()}
    if TIED_BIAS in named:
        named["cls.predictions.bias"] = named.pop(TIED_BIAS)
    return named


def answer(model: nn.Module, call: Call, dtype: torch.dtype) -> Answer:
    """What `passes.make_call` asks of our class."""
    inputs = prepared(call, dtype)
    model.train(call.is_training)
    model.zero_grad(set_to_none=True)
    labels = inputs.pop("labels", None) if type(model).__name__ == CAUSAL else None
    output = model(**inputs, **call.switches)
    if labels is not None:
        output.loss = shifted_loss(output.logits, labels)
    objective_of(output).backward()
    gradients = {name: gradient(inputs[name]) for name in call.differentiable}
    return Answer(all_outputs(output), gradients, {k: gradient(p) for k, p in parameters_of(model).items()})


def gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each token from those before it; `transformers` itself computes it in float32 only."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def refer(architecture: str, setups: tuple[Setup, ...], folder: Path) -> Reference:
    """Save the models of all setups, then make all calls in both precisions."""
    answers: dict[torch.dtype, dict[tuple[str, str], Answer]] = {torch.float64: {}, torch.float32: {}}
    for setup in setups:
        model = build(architecture, dict(setup.settings))
        model.save_pretrained(folder / setup.name)
        for dtype, found in answers.items():
            model = model.to(dtype)
            found |= {(setup.name, name): answer(model, call, dtype) for name, call in setup.calls.items()}
    return Reference(folder, answers)


