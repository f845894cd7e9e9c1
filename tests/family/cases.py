"""Every class with every kind of argument: settings of a model, and the calls that are made of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_bert_tp.model.shape import ACTIVATIONS
from tests.family.passes import Call
from tests.golden.formula import integers, uniform
from tests.support import IGNORED, ODD_SHAPE

BATCH, WIDTH, CHOICES, LABELS = 3, 11, 3, 3
LENGTHS = (11, 7, 4)
PRETRAINING = "MegatronBertForPreTraining"
MASKED = "MegatronBertForMaskedLM"
CAUSAL = "MegatronBertForCausalLM"
CLASSIFICATION = "MegatronBertForSequenceClassification"
CHOICE = "MegatronBertForMultipleChoice"
ANSWERING = "MegatronBertForQuestionAnswering"
BASE = "MegatronBertModel"
ARCHITECTURES = (
    BASE, PRETRAINING, MASKED, CAUSAL, "MegatronBertForNextSentencePrediction", CLASSIFICATION, CHOICE,
    "MegatronBertForTokenClassification", ANSWERING,
)  # fmt: skip

# Sizes that nothing divides by, and names as `transformers` has them.
ODD = {
    name: getattr(ODD_SHAPE, name)
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob",
    )
} | {"type_vocab_size": 3, "num_labels": LABELS, "layer_norm_eps": 1e-7}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """One model, by its settings beside `ODD`, and the calls that are made of it by name."""

    name: str
    settings: Mapping[str, Any]
    calls: Mapping[str, Call] = field(default_factory=dict)


def setups_of(architecture: str) -> tuple[Setup, ...]:
    """All models and calls of one class."""
    base = {CAUSAL: {"is_decoder": True}, ANSWERING: {"num_labels": 2}}.get(architecture, {})
    # Hugging Face flattens the choices of a 2-D mask only.
    makers = [make for make in CALLS if not (architecture == CHOICE and make in (additive, additive_by_head))]
    one = {"padded": padded(architecture)}
    setups = [Setup("gelu", base, {make.__name__: make(architecture) for make in makers})]
    activations = ACTIVATIONS[1:] if architecture == MASKED else ("gelu_new",)
    setups += [Setup(name, {**base, "hidden_act": name}, one) for name in activations]
    return (*setups, *_special(architecture, base, one))


def _special(architecture: str, base: Mapping[str, Any], one: Mapping[str, Call]) -> Iterator[Setup]:
    if architecture in (PRETRAINING, MASKED, CAUSAL):
        yield Setup("untied", {**base, "tie_word_embeddings": False}, one)
    if architecture == BASE:
        yield Setup("decoder", {"is_decoder": True}, one)
    if architecture == CAUSAL:
        yield Setup("last logits", base, {"three": Call(tokens(architecture), {"logits_to_keep": 3})})
    if architecture in (BASE, CAUSAL):
        crossing = {"is_decoder": True, "add_cross_attention": True}
        yield Setup("cross-attention", crossing, {"equal lengths": crossed(architecture)})
    if architecture == CLASSIFICATION:
        yield from _problem_types()


def _problem_types() -> Iterator[Setup]:
    """The class decides by number of labels and dtype, unless the settings do."""
    several, one = uniform("targets", (BATCH, LABELS), low=0, high=1).round(), uniform("target", (BATCH,))
    given = masked(CLASSIFICATION)
    yield Setup("multi-label by dtype", {}, {"several": Call({**given, "labels": several})})
    yield Setup("regression by number", {"num_labels": 1}, {"one": Call({**given, "labels": one})})
    for problem in ("regression", "multi_label_classification"):
        yield Setup(problem, {"problem_type": problem}, {"several": Call({**given, "labels": several})})


# Inputs


def rows(architecture: str) -> tuple[int, ...]:
    return (BATCH, CHOICES) if architecture == CHOICE else (BATCH,)


def tokens(architecture: str) -> dict[str, Tensor]:
    ids = integers(f"ids {architecture}", (*rows(architecture), WIDTH), low=1, high=ODD["vocab_size"])
    # Beside the padding rows of the vocabulary; and a [PAD] that is attended to and must get no gradient from it.
    ids[..., 0, 1], ids[..., 0, 3] = ODD["vocab_size"] - 1, 0
    return {"input_ids": ids}


def masked(architecture: str) -> dict[str, Tensor]:
    """Ids with segments and a padding mask."""
    given = tokens(architecture)
    real = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    mask = real[:, None].expand(*rows(architecture), WIDTH) if architecture == CHOICE else real
    types = integers("types", given["input_ids"].shape, low=0, high=3)
    return {**given, "token_type_ids": types, "attention_mask": mask.long()}


def labels_of(architecture: str) -> dict[str, Tensor]:
    """Labels of a class: some positions are ignored, some lie outside the sequence."""
    places = integers("labelled", (BATCH, WIDTH), low=0, high=3) > 0
    words = integers("words", (BATCH, WIDTH), low=0, high=ODD["vocab_size"]).masked_fill(places, IGNORED)
    kinds = integers("kinds", (BATCH, WIDTH), low=0, high=LABELS).masked_fill(~places, IGNORED)
    pair, choice = torch.tensor([1, 0, 1]), torch.tensor([2, 0, 1])
    ends = {"start_positions": torch.tensor([3, WIDTH, 0]), "end_positions": torch.tensor([-2, 5, WIDTH + 40])}
    return {
        BASE: {},
        PRETRAINING: {"labels": words, "next_sentence_label": pair},
        MASKED: {"labels": words},
        CAUSAL: {"labels": words},
        "MegatronBertForNextSentencePrediction": {"labels": pair},
        CLASSIFICATION: {"labels": choice},
        CHOICE: {"labels": choice},
        "MegatronBertForTokenClassification": {"labels": kinds},
        ANSWERING: ends,
    }[architecture]


# Calls


def padded(architecture: str) -> Call:
    return Call({**masked(architecture), **labels_of(architecture)})


def in_training(architecture: str) -> Call:
    """Training mode, in which other code may run, with dropout 0; every layer's states and probabilities."""
    everything = {"output_attentions": True, "output_hidden_states": True}
    return Call({**masked(architecture), **labels_of(architecture)}, everything, is_training=True)


def positioned(architecture: str) -> Call:
    """Position ids in another order, beyond the width; a loss over the outputs, without labels."""
    ids = tokens(architecture)
    order = integers("positions", ids["input_ids"].shape, low=0, high=ODD["max_position_embeddings"])
    return Call({**ids, "position_ids": order}, {"output_attentions": True})


def embedded(architecture: str) -> Call:
    """Embeddings in the place of ids, with the gradient to them."""
    given = masked(architecture) | labels_of(architecture)
    shape = given.pop("input_ids").shape
    vectors = uniform("embeddings", (*shape, ODD["hidden_size"]))
    return Call({**given, "inputs_embeds": vectors}, {"output_hidden_states": True}, ("inputs_embeds",))


def additive(architecture: str) -> Call:
    """A 4-D mask of any numbers, which is added to the scores; also to those that a decoder would hide."""
    mask = uniform("mask", (BATCH, 1, WIDTH, WIDTH), low=-3, high=1)
    return Call({**tokens(architecture), "attention_mask": mask.where(mask > -2, -1e9), **labels_of(architecture)})


def additive_by_head(architecture: str) -> Call:
    """A 4-D mask that differs by head, of which each rank must take its own."""
    mask = uniform("mask by head", (BATCH, ODD["num_attention_heads"], WIDTH, WIDTH), low=-3, high=1)
    return Call({**tokens(architecture), "attention_mask": mask}, {"output_attentions": True})


def crossed(architecture: str) -> Call:
    """As long as the decoder's sequence, since transformers 5 fails for any other length."""
    states = uniform("encoder", (BATCH, WIDTH, ODD["hidden_size"]))
    real = (torch.arange(WIDTH) < torch.tensor([5, WIDTH, 8])[:, None]).long()
    given = {**masked(architecture), "encoder_hidden_states": states, "encoder_attention_mask": real}
    switches = {"output_attentions": True, "output_hidden_states": True}
    return Call({**given, **labels_of(architecture)}, switches, ("encoder_hidden_states",))


CALLS = (padded, in_training, positioned, embedded, additive, additive_by_head)
