"""Tensor- and pipeline-parallel training of MegatronBert, from and to Hugging Face weights.

The nine classes of the family and their settings are exported here, and imported when they are first asked for:
``import megatron_bert_tp`` alone does not import torch (PEP 562).
"""

from importlib import import_module

_HOMES = {
    "MegatronBertConfig": "family.config",
    "MegatronBertModel": "family.models",
    "MegatronBertForPreTraining": "family.models",
    "MegatronBertForMaskedLM": "family.models",
    "MegatronBertForCausalLM": "family.models",
    "MegatronBertForNextSentencePrediction": "family.models",
    "MegatronBertForSequenceClassification": "family.models",
    "MegatronBertForMultipleChoice": "family.models",
    "MegatronBertForTokenClassification": "family.models",
    "MegatronBertForQuestionAnswering": "family.models",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Import a class on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
