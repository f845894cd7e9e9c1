"""Dropout is decided by seed, layer, place and sample: neither the layout nor what is asked for changes it.

The truth is one process that asks for nothing: its path through attention is another than with probabilities.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_bert_tp
from megatron_bert_tp import MegatronBertConfig
from tests.family.cases import (
    ANSWERING,
    ARCHITECTURES,
    BASE,
    CAUSAL,
    CHOICE,
    CLASSIFICATION,
    ODD,
    labels_of,
    masked,
)
from tests.family.cases import crossed as crossed_call
from tests.family.passes import (
    Answer,
    Bounds,
    Call,
    RankAnswer,
    differences,
    guarded,
    idle_gradients,
    joined,
    load,
    make_call,
    mesh_of,
    on_ranks,
)
from tests.golden.formula import uniform
from tests.sources import assert_none

DROPPED = {**ODD, "hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.25, "initializer_range": 0.2}
SAMPLES = (7, 3, 11)
EXACT = Bounds(outputs=1e-10, gradients=1e-10, idle=1e-12)
ASKED = {"output_attentions": True}
CROSS = {"is_decoder": True, "add_cross_attention": True}


def call_of(architecture: str) -> Call:
    given = {**masked(architecture), **labels_of(architecture)}
    return Call(given, {"sample_numbers": SAMPLES}, is_training=True)


def models_of(architecture: str) -> Mapping[str, tuple[dict[str, Any], Call]]:
    """Settings and a call of each kind of attention that a class has."""
    call = call_of(architecture)
    own = {CAUSAL: {"is_decoder": True}}.get(architecture, {})
    own |= {"num_labels": 2} if architecture == ANSWERING else {}
    found = {"absolute": (own, call)}
    if architecture == BASE:
        kinds = ("relative_key", "relative_key_query")
        found |= {kind: ({**own, "position_embedding_type": kind}, call) for kind in kinds}
        heads = uniform("heads", (ODD["num_hidden_layers"], ODD["num_attention_heads"]), low=0, high=1)
        found["head mask"] = own, replace(call, inputs={**call.inputs, "head_mask": heads})
        crossed = replace(crossed_call(architecture), switches=call.switches, is_training=True)
        found["cross-attention"] = {**own, **CROSS}, crossed
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dropout")
    for architecture in ARCHITECTURES:
        for name, (settings, _) in models_of(architecture).items():
            config = MegatronBertConfig(**{**DROPPED, **settings})
            model = getattr(megatron_bert_tp, architecture)(config, dtype=torch.float64)
            model.save_pretrained(folder / architecture / name)
    return folder


def run_class(
    size: int, architecture: str, folder: Path, switches: Mapping[str, Any]
) -> dict[str, RankAnswer | str]:
    """One training call of each kind on this rank."""
    mesh = mesh_of(size)
    found: dict[str, RankAnswer | str] = {}
    for name, (_, call) in models_of(architecture).items():
        model = load(architecture, folder / architecture / name, mesh, torch.float64)
        asked = replace(call, switches={**call.switches, **switches})
        found[name] = guarded(make_call, model, asked, torch.float64)
    return found


def run(ranks: Any, size: int, architecture: str, folder: Path, switches: Mapping[str, Any]) -> dict[str, Answer]:
    answers = on_ranks(ranks, size, run_class, architecture, folder, switches)
    found = {name: guarded(joined, [answer[name] for answer in answers]) for name in answers[0]}
    assert_none(f"{name}: {told}" for name, told in found.items() if isinstance(told, str))
    return found


def without_attentions(answer: Answer) -> Answer:
    plain = {name: value for name, value in answer.outputs.items() if "attentions" not in name}
    return replace(answer, outputs=plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("size", "switches"), [(1, ASKED), (2, ASKED), (4, {})])
def test_no_layout_and_no_question_changes_what_is_dropped(ranks, folder, architecture, size, switches):
    truth = run(ranks, 1, architecture, folder, {})
    problems = []
    for name, found in run(ranks, size, architecture, folder, switches).items():
        idle = idle_gradients(truth[name].gradients)
        told = differences(without_attentions(found), truth[name], EXACT, idle)
        problems += [f"{name}: {line}" for line in told]
    assert_none(problems)


def test_returned_attentions_are_those_after_dropout(ranks, folder):
    """As in Hugging Face: a quarter of them is zero in training, and the rest is scaled up."""
    for name, answer in run(ranks, 1, BASE, folder, ASKED).items():
        kept = torch.stack([v for k, v in answer.outputs.items() if k.startswith("attentions")])
        # The first sample has no padding; of a decoder's 11 x 11 places, 66 are not in the future.
        places = 66 / 121 if name == "cross-attention" else 1.0
        assert (kept[:, 0] != 0).double().mean() == pytest.approx(0.75 * places, abs=0.05)


def test_one_sample_drops_the_same_in_any_batch(folder):
    """Its number decides, and not its row."""
    model = load(BASE, folder / BASE / "absolute", None, torch.float64).train()
    inputs = masked(BASE)
    whole = model(**inputs, sample_numbers=SAMPLES).last_hidden_state
    for row, number in enumerate(SAMPLES):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        assert (model(**alone, sample_numbers=(number,)).last_hidden_state - whole[row]).abs().max() < 1e-12


def test_numbers_count_up_by_themselves(folder):
    """So that no batch meets the bits of another, and a model loaded anew repeats them."""
    path = folder / BASE / "absolute"
    first, second = (load(BASE, path, None, torch.float64).train() for _ in range(2))
    inputs = masked(BASE)
    one, two = first(**inputs).last_hidden_state, first(**inputs).last_hidden_state
    assert not torch.equal(one, two)
    assert torch.equal(one, second(**inputs).last_hidden_state)
    three = second(**inputs, sample_numbers=(3, 4, 5)).last_hidden_state
    assert torch.equal(three, two)


def test_evaluation_neither_drops_nor_counts(folder):
    model = load(BASE, folder / BASE / "absolute", None, torch.float64).train()
    inputs = masked(BASE)
    expected = load(BASE, folder / BASE / "absolute", None, torch.float64).train()(**inputs).last_hidden_state
    still = model.eval()(**inputs).last_hidden_state
    assert torch.equal(model(**inputs).last_hidden_state, still)
    assert torch.equal(model.train()(**inputs).last_hidden_state, expected)


def test_choices_of_one_sample_drop_apart(folder):
    model = load(CHOICE, folder / CHOICE / "absolute", None, torch.float64).train()
    inputs = {name: value[:, :1].expand(-1, 3, -1) for name, value in masked(CHOICE).items()}
    logits = model(**inputs, sample_numbers=SAMPLES).logits
    assert len(set(logits[0].tolist())) == 3


def test_choices_of_one_sample_drop_the_same_in_any_batch(folder):
    model = load(CHOICE, folder / CHOICE / "absolute", None, torch.float64).train()
    inputs = masked(CHOICE)
    whole = model(**inputs, sample_numbers=SAMPLES).logits
    alone = {name: value[1:2] for name, value in inputs.items()}
    assert (model(**alone, sample_numbers=SAMPLES[1:2]).logits[0] - whole[1]).abs().max() < 1e-12


# What the heads drop


def head_inputs(architecture: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States that a linear head sees in training, and its logits, with a unit matrix in its place."""
    settings = {**DROPPED, "num_labels": rows}
    model = getattr(megatron_bert_tp, architecture)(MegatronBertConfig(**settings), dtype=torch.float64).train()
    head = model.get_submodule("qa_outputs" if architecture == ANSWERING else "classifier")
    with torch.no_grad():
        head.weight.copy_(torch.eye(len(head.weight), ODD["hidden_size"]))
    output = model(**masked(architecture), output_hidden_states=True)
    states = output.hidden_states[-1]
    if model.head.has_pooler:
        states = torch.tanh(model.bert.pooler.dense(states[:, 0]))
    is_answer = architecture == ANSWERING
    logits = torch.stack([output.start_logits, output.end_logits], -1) if is_answer else output.logits
    return states[..., : len(head.weight)], logits.reshape(*states.shape[:-1], -1)


@pytest.mark.parametrize("architecture", [CLASSIFICATION, CHOICE, "MegatronBertForTokenClassification"])
def test_classifiers_drop_what_they_read(architecture):
    """A quarter of the features within five standard errors; the others are scaled up, as in Hugging Face."""
    states, logits = head_inputs(architecture, ODD["hidden_size"])
    is_kept = logits != 0
    assert ((logits - states / 0.75).abs() < 1e-12)[is_kept].all()
    assert is_kept.double().mean() == pytest.approx(0.75, abs=5 * (0.1875 / is_kept.numel()) ** 0.5)
    assert not is_kept.all()


def test_question_answering_drops_nothing_before_its_head():
    states, logits = head_inputs(ANSWERING, 2)
    assert (logits - states).abs().max() < 1e-12
