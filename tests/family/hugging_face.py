"""The small models and batches of Hugging Face's own test-suite (tests/models/megatron_bert)."""

from typing import Any

import torch
from torch import Tensor, nn

import megatron_bert_tp
from megatron_bert_tp import MegatronBertConfig
from megatron_bert_tp.errors import LayoutError
from tests.family.cases import ANSWERING, BASE, CAUSAL, CHOICE, CLASSIFICATION, MASKED, PRETRAINING
from tests.family.passes import mesh_of
from tests.golden.formula import integers

BATCH, WIDTH, VOCABULARY, HIDDEN, LAYERS, HEADS, LABELS, CHOICES = 13, 7, 99, 64, 2, 4, 3, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 37,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 16,
    "initializer_range": 0.02,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SENTENCE = "MegatronBertForNextSentencePrediction"
TOKEN = "MegatronBertForTokenClassification"
HAS_LABELS = (CLASSIFICATION, TOKEN)
WITH_VOCABULARY_HEAD = (PRETRAINING, MASKED, CAUSAL)

# Of all outputs that a call without labels gives.
SHAPES = {
    BASE: {"last_hidden_state": (BATCH, WIDTH, HIDDEN), "pooler_output": (BATCH, HIDDEN)},
    PRETRAINING: {"prediction_logits": (BATCH, WIDTH, VOCABULARY), "seq_relationship_logits": (BATCH, 2)},
    MASKED: {"logits": (BATCH, WIDTH, VOCABULARY)},
    CAUSAL: {"logits": (BATCH, WIDTH, VOCABULARY)},
    SENTENCE: {"logits": (BATCH, 2)},
    CLASSIFICATION: {"logits": (BATCH, LABELS)},
    CHOICE: {"logits": (BATCH, CHOICES)},
    TOKEN: {"logits": (BATCH, WIDTH, LABELS)},
    ANSWERING: {"start_logits": (BATCH, WIDTH), "end_logits": (BATCH, WIDTH)},
}


def settings_of(architecture: str, **changes: Any) -> dict[str, Any]:
    """Settings of a class in the suite."""
    own = {"num_labels": LABELS} if architecture in HAS_LABELS else {}
    own |= {"is_decoder": True} if architecture == CAUSAL else {}
    return {**SIZES, **own, **changes}


def make(architecture: str, **changes: Any) -> nn.Module:
    """Model of our class, in evaluation mode."""
    config = MegatronBertConfig(**settings_of(architecture, **changes))
    return getattr(megatron_bert_tp, architecture)(config).eval()


def refused(size: int, architecture: str, settings: dict[str, Any]) -> str:
    """What this rank is told when the model does not fit the tensor size."""
    try:
        getattr(megatron_bert_tp, architecture)(MegatronBertConfig(**settings), mesh=mesh_of(size))
    except LayoutError as error:
        return str(error)
    return "it was built"


def inputs_of(architecture: str) -> dict[str, Tensor]:
    """Random ids, segments, and a mask with holes in which every row sees its first token."""
    rows = (BATCH, CHOICES) if architecture == CHOICE else (BATCH,)
    mask = integers("suite mask", (*rows, WIDTH), low=0, high=2)
    mask[..., 0] = 1
    return {
        "input_ids": integers("suite ids", (*rows, WIDTH), low=0, high=VOCABULARY),
        "token_type_ids": integers("suite types", (*rows, WIDTH), low=0, high=16),
        "attention_mask": mask,
    }


def labels_of(architecture: str) -> dict[str, Tensor]:
    """Labels as the suite makes them."""
    words = integers("suite words", (BATCH, WIDTH), low=0, high=VOCABULARY)
    row = torch.zeros(BATCH, dtype=torch.long)
    return {
        BASE: {},
        PRETRAINING: {"labels": words, "next_sentence_label": row},
        MASKED: {"labels": words},
        CAUSAL: {"labels": words},
        SENTENCE: {"labels": row},
        CLASSIFICATION: {"labels": row + 2},
        CHOICE: {"labels": row + 3},
        TOKEN: {"labels": words % LABELS},
        ANSWERING: {"start_positions": row + 2, "end_positions": row + 5},
    }[architecture]
