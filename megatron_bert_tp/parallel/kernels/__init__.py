"""Triton kernels; a module of this folder imports triton, so it is imported only when a kernel is to run."""

from importlib import import_module
from types import ModuleType

from megatron_bert_tp.errors import ConfigError


def load_kernels(name: str) -> ModuleType:
    """The module ``name`` of this folder; ConfigError where triton is not installed."""
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise ConfigError(
            "dropout on a GPU runs as Triton kernels, and the package `triton` is not installed. It comes with "
            "the CUDA builds of torch for Linux: reinstall torch, or `pip install triton`; or train on the CPU "
            "(run.device=cpu), or without dropout (model.hidden_dropout_prob=0 "
            "model.attention_probs_dropout_prob=0)"
        ) from error
