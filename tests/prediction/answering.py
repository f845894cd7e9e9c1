"""Questions whose answers by transformers 4.57 are golden numbers, and the model that is asked; see texts.py."""

import torch

from tests.golden.formula import weight
from tests.prediction.texts import LONG, TEXTS

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
QUESTIONS = [
    ("Who found the river?", TEXTS[0], {}),
    ("What does Åse do in the CAFÉ?", TEXTS[1], {}),
    ("Where is 山?", TEXTS[2], {}),
    ("Is 😀 happy?", TEXTS[3], {}),
    ("x?", TEXTS[4], {}),
    ("Which school?", TEXTS[5], {}),
    ("Which school?", TEXTS[5], {"top_k": 4}),
    ("Which marks are no problem?", TEXTS[6], {}),
    ("When was the 7th river found?", LONG, {}),
    ("When was the 7th river found?", LONG, {"top_k": 3}),
    ("When was the 7th river found?", LONG, {"max_answer_len": 3}),
    ("When was the 7th river found?", LONG, {"max_seq_len": 64, "doc_stride": 16}),
    ("When was the 39th river found? " * 6, LONG, {}),
    ("A word that [MASK] and [SEP] are in?", "The [MASK] of [SEP] London [CLS] found.", {}),
]


def answering_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights that prefer some words clearly over others."""
    factor = 6.0 if name.startswith("qa_outputs") else 2.0 if name.endswith("word_embeddings.weight") else 1.0
    return factor * weight(name, shape)
