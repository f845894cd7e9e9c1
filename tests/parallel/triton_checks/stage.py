"""Whole stages whose dropout is computed by kernels, against the same stages in float64 with torch's way."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_bert_tp.model.recompute import Recompute
from megatron_bert_tp.model.shape import HEADS
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.random_bits import Place, RandomBits, keep_mask
from megatron_bert_tp.parallel.triton_dropout import KernelBits, TokenBits
from tests.comparison import is_key_bias, join, relative_errors
from tests.model.stages import (
    Model,
    Result,
    Way,
    batches_of,
    built,
    pieces_of,
    run_passes_,
    sum_over_sequence_,
)
from tests.support import ODD_SHAPE, Layout, build_mesh, with_dropout

SHAPE = with_dropout(
    replace(
        ODD_SHAPE, vocab_size=103, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=48,
    )
)  # fmt: skip
# In a packed row two groups of like lengths, the longest sample in the middle.
LENGTHS = {False: ((7, 13, 9),), True: ((4, 34, 9),)}
LABELLED = replace(SHAPE, num_labels=3)
ALONE = Axis.alone("tensor")
MODELS = {
    "padded": Model(SHAPE),
    "packed": Model(SHAPE, is_packed=True),
    "causal": Model(replace(SHAPE, is_decoder=True)),
    "packed and causal": Model(replace(SHAPE, is_decoder=True), is_packed=True),
    "rows begin inside a block": Model(
        replace(SHAPE, hidden_size=24, max_position_embeddings=37), is_packed=True
    ),
    "distances": Model(replace(SHAPE, position_embedding_type="relative_key")),
    "dropout of hidden states alone": Model(replace(SHAPE, attention_probs_dropout_prob=0.0), is_packed=True),
    "dropout of attention alone": Model(replace(SHAPE, hidden_dropout_prob=0.0)),
    "untied": Model(replace(SHAPE, tie_word_embeddings=False)),
    "classifier of samples": Model(LABELLED, HEADS["MegatronBertForSequenceClassification"]),
    "classifier of packed samples": Model(
        LABELLED, HEADS["MegatronBertForSequenceClassification"], is_packed=True
    ),
    "classifier of tokens": Model(LABELLED, HEADS["MegatronBertForTokenClassification"], is_packed=True),
}
SAVING = {
    "selective": Way(recompute=Recompute("selective")),
    "full": Way(recompute=Recompute("full")),
    "full, put off": Way(recompute=Recompute("full"), puts_off=True),
    "put off": Way(puts_off=True),
}
SPLIT = {"tensor 2": Way(tensor=2), "sequence split": Way(tensor=2, splits_sequence=True)}
# A number passes two layers of four products and a softmax each, forward and backward, and the heads: some 20
# sums of at most 50 terms, of a relative error of 2^-24 times the terms.  Errors of 1 in all of them at once do
# not happen; one element that is dropped and should not be changes a gradient by some percent.
ROUNDING = 20 * 50 * 2**-24
# Of 16 bits, 2^-9 for each of some 20 stored results.
NARROW_ROUNDING = 20 * 2**-9


def run_with_kernels(
    model: Model, way: Way, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Result:
    axis = build_mesh(Layout(tensor=way.tensor)).tensor if way.tensor > 1 else ALONE
    stage = built(replace(model, dtype=dtype), way, axis).to(device)
    stage.kernels = "triton"
    batches = [batch.to(torch.device(device)) for batch in batches_of(model, LENGTHS[model.is_packed])]
    with torch.device(device):
        losses = run_passes_(stage, batches, puts_off=way.puts_off)
    sum_over_sequence_(stage)
    return Result(losses, [replace(piece, values=piece.values.cpu()) for piece in pieces_of(stage)])


def truth_of(model: Model) -> Result:
    stage = built(model, Way(), ALONE)
    losses = run_passes_(stage, batches_of(model, LENGTHS[model.is_packed]), puts_off=False)
    return Result(losses, pieces_of(stage))


def assert_follows(results: list[Result], truth: Result, rounding: float = ROUNDING) -> None:
    for result in results:
        assert result.losses == pytest.approx(truth.losses, rel=rounding)
    expected = join(truth.gradients)
    found = join(piece for result in results for piece in result.gradients)
    errors = relative_errors({name: values.double() for name, values in found.items()}, expected)
    assert len(errors) > 20
    assert {n: e for n, e in errors.items() if not is_key_bias(n) and not e <= rounding} == {}


@pytest.fixture
def drawn_on_host(monkeypatch) -> list[Place]:
    """Places of bits that are drawn on the host."""
    places: list[Place] = []
    lanes = RandomBits.lanes

    def spy(bits: RandomBits, sample: int, **where: Any):
        places.append(where["place"])
        return lanes(bits, sample, **where)

    monkeypatch.setattr(RandomBits, "lanes", spy)
    return places


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_follow_float64(device, drawn_on_host, name):
    model = MODELS[name]
    found = run_with_kernels(model, Way(), device)
    assert set(drawn_on_host) == ({Place.ATTENTION_PROBABILITIES} if model.shape.is_relative else set())
    assert_follows([found], truth_of(model))


@pytest.mark.parametrize("is_packed", [False, True])
def test_computing_again_and_putting_off_change_no_bit(device, is_packed):
    model = Model(SHAPE, is_packed=is_packed)
    truth = run_with_kernels(model, Way(), device)
    for name, way in SAVING.items():
        found = run_with_kernels(model, way, device)
        assert found.losses == truth.losses
        for ours, theirs in zip(found.gradients, truth.gradients, strict=True):
            assert torch.equal(ours.values, theirs.values), (name, ours.name)


def test_bfloat16_follows_float64(device):
    if device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    found = run_with_kernels(MODELS["packed"], Way(), device, torch.bfloat16)
    assert_follows([found], truth_of(MODELS["packed"]), NARROW_ROUNDING)


def run_both(jobs: list[tuple[Model, Way]]) -> list[Result]:
    return [run_with_kernels(*job) for job in jobs]


def test_tensor_ranks_follow_one_process(device, ranks):
    """The ranks talk over gloo, so they are on the CPU; two samples are cut by the border between their runs."""
    if device.type != "cpu":
        pytest.skip("two ranks on a GPU each are the business of torchrun")
    jobs = [(MODELS[name], way) for name in ("padded", "packed") for way in SPLIT.values()]
    answers = ranks.run(2, run_both, [*jobs, (MODELS["packed"], replace(jobs[-1][1], puts_off=True))])
    for number, (model, _) in enumerate(jobs):
        assert_follows([answer[number] for answer in answers], truth_of(model))
    for answer in answers:
        assert answer[-1].losses == answer[-2].losses
        for later, joint in zip(answer[-1].gradients, answer[-2].gradients, strict=True):
            assert torch.equal(later.values, joint.values), later.name


def patterns_of(stage: MegatronBertStage, device: torch.device) -> dict[tuple[int, Place], torch.Tensor]:
    """Elements ``[1, tokens, hidden]`` that dropout kept in all sublayers: the others equal the residual."""
    kept = {}

    def watch(layer: torch.nn.Module, place: Place):
        def hook(module: Any, given: tuple[Any, ...], output: torch.Tensor) -> None:
            kept[module.number, place] = (output != given[1]).cpu()

        layer.register_forward_hook(hook)

    for layer in stage.bert.encoder.layer:
        watch(layer.attention.output, Place.ATTENTION_OUTPUT)
        watch(layer.output, Place.MLP_OUTPUT)
    (batch,) = batches_of(MODELS["packed"], LENGTHS[True])
    stage.to(device)(None, batch.to(device))
    return kept


def test_the_same_elements_are_dropped_in_every_layer(device):
    model = replace(MODELS["packed"], dtype=torch.float32)
    stage = built(model, Way(), ALONE)
    stage.kernels = "triton"
    found = patterns_of(stage, device)
    assert len(found) == 2 * SHAPE.num_hidden_layers
    bits = RandomBits(3, (0, 1, 2), LENGTHS[True][0])
    for (layer, place), kept in found.items():
        lanes = bits.hidden(layer, place, positions=kept.shape[1], features=kept.shape[2])
        assert torch.equal(kept, keep_mask(lanes, 0.1).bool()), (layer, place)


@pytest.mark.parametrize("name", ["padded", "packed"])
def test_what_kernels_read_is_made_once_a_microbatch(device, monkeypatch, name):
    calls = []
    for kind in (TokenBits, KernelBits):
        make = kind.of.__func__

        def spy(cls, *given, make=make, **named):
            calls.append(cls)
            return make(cls, *given, **named)

        monkeypatch.setattr(kind, "of", classmethod(spy))
    run_with_kernels(MODELS[name], Way(recompute=Recompute("full")), device)
    assert calls == [KernelBits, TokenBits]


def test_evaluation_draws_nothing_and_is_torchs(device, monkeypatch):
    monkeypatch.setattr(KernelBits, "of", None)
    outputs = []
    for kernels in ("torch", "triton"):
        stage = built(replace(MODELS["padded"], dtype=torch.float32), Way(), ALONE).eval().to(device)
        stage.kernels = kernels
        (batch,) = batches_of(MODELS["padded"], LENGTHS[False])
        outputs.append(stage(None, batch.to(device)).masked)
    assert torch.equal(*outputs)
