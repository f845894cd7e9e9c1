"""A number that is not finite is traced to the step, rank and module in which it first was, at every layout."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megatron_bert_tp.training.anomalies import What
from tests.support import Layout, Recipe
from tests.test_layouts import name_of
from tests.trainers import CORPUS_SHAPE, configure, trainer_of
from tests.training.spoiling import Spoil, Spoiler, train_spoilt
from tests.training.test_anomalies import assert_alike

RECIPE = Recipe(shape=CORPUS_SHAPE, dtype=torch.float32, num_steps=2, clip_norm=0.5)
EVERYTHING = Layout(data=2, pipeline=2, schedule="zb-v", virtual=2, shards=True, packing="packed",
                    recompute="full")  # fmt: skip
PIPELINE = Layout(pipeline=2)
TENSOR = Layout(tensor=2)
ZERO_BUBBLE = Layout(pipeline=2, schedule="zb-h1")


def layer(number: int, rest: str) -> str:
    return f"bert.encoder.layer.{number}.{rest}"


@dataclass(frozen=True)
class Case:
    """What is spoilt where, and what must be found; samples 8 to 15 are those of the second step."""

    layout: Layout
    spoil: Spoil
    what: What
    ranks: tuple[int, ...]
    microbatch: int | None = 0
    samples: tuple[int, ...] = (8, 9)
    name: str | None = None
    """None: where it was spoilt."""


CASES = {
    "activation of one tensor rank": Case(
        TENSOR, Spoil("output", layer(1, "intermediate.dense"), rank=1, sample=11), What.OUTPUT, (1,), 1, (10, 11)
    ),
    "infinite activation of one tensor rank that has its own tokens": Case(
        Layout(tensor=2, sequence=True), Spoil("output", layer(1, "output.dense"), rank=1, value=math.inf),
        What.OUTPUT, (1,),
    ),
    "term of one tensor rank in a sum that all have": Case(
        # Finite itself; times an activation above 1.2 it is beyond the largest float32.
        TENSOR, Spoil("weight", layer(1, "output.dense.weight"), rank=1, value=3e38), What.OUTPUT, (1,),
        name=layer(1, "output.dense"),
    ),
    "activation on the first stage": Case(
        PIPELINE, Spoil("output", layer(0, "attention.ln"), sample=14), What.OUTPUT, (0,), 3, (14, 15)
    ),
    "embeddings": Case(
        PIPELINE, Spoil("output", "bert.embeddings.word_embeddings", value=-math.inf), What.OUTPUT, (0,)
    ),
    "activation under recomputation": Case(
        Layout(recompute="full"), Spoil("output", layer(2, "attention.self.query_key_value"), sample=13),
        What.OUTPUT, (0,), 2, (12, 13),
    ),
    "activation of one replica": Case(
        Layout(data=2), Spoil("output", "cls.predictions.transform.dense", rank=1, sample=14),
        What.OUTPUT, (1,), 1, (14, 15),
    ),
    "gradient on the last stage": Case(
        PIPELINE, Spoil("gradient", layer(4, "intermediate.dense"), rank=1, sample=12), What.OUTPUT_GRADIENT, (1,),
        2, (12, 13),
    ),
    "gradient on the first stage, weights put off": Case(
        ZERO_BUBBLE, Spoil("gradient", layer(1, "output.dense"), sample=10),
        What.OUTPUT_GRADIENT, (0,), 1, (10, 11),
    ),
    "gradient of one tensor rank under sequence parallelism and recomputation": Case(
        Layout(tensor=2, sequence=True, recompute="selective"),
        Spoil("gradient", layer(3, "intermediate.dense"), rank=1, value=math.inf), What.OUTPUT_GRADIENT, (1,),
    ),
    "gradient of a parameter": Case(
        Layout(data=2, shards=True), Spoil("weight gradient", layer(1, "ln.weight"), rank=1, sample=14),
        What.PARAMETER_GRADIENT, (1,), 1, (14, 15),
    ),
    "weight": Case(
        Layout(pipeline=2, tensor=2), Spoil("weight", layer(4, "ln.weight"), rank=3),
        What.PARAMETER, (3,), None, (),
    ),
    "weight of a replica": Case(
        Layout(data=2), Spoil("weight", "cls.predictions.bias", rank=1, value=math.inf),
        What.PARAMETER, (1,), None, (),
    ),
    "loss": Case(
        PIPELINE, Spoil("loss", "the model", rank=1, sample=14), What.LOSS, (1,), 3, (14, 15)
    ),
    "activation with everything at once": Case(
        # Two stages on each rank: rank 2 has the second and the third of four.
        EVERYTHING, Spoil("output", layer(2, "output.dense"), rank=2), What.OUTPUT, (2,), samples=(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_first_tensor_that_is_not_finite_is_named_with_rank_microbatch_and_samples(ranks, data, case):
    outcomes = ranks.run(case.layout.world, train_spoilt, data, RECIPE, case.layout, case.spoil)
    first = assert_alike(outcomes)
    assert (first.error_kind, first.num_steps) == ("NotFiniteError", 1)
    (report,) = first.reports
    origin = report.attribution.origin
    assert (origin.what, origin.name) == (case.what, case.name or case.spoil.name)
    assert (origin.ranks, origin.microbatch) == (case.ranks, case.microbatch)
    if case.layout.packing == "none":
        assert origin.samples == case.samples
    assert set(origin.samples) <= set(report.samples) == set(range(8, 16))
    assert first.error == report.message
    assert first.error.startswith("step 2 (samples 8 to 15): loss ")
    assert f"{case.what.value} {origin.name} on rank {case.ranks[0]} (" in first.error
    # What was spoilt in place aside, nothing has moved.
    assert all(each.moved == [True, case.spoil.what == "weight" and r in case.ranks] or case.name
               for r, each in enumerate(outcomes))  # fmt: skip


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2, sequence=True, packing="packed"), ZERO_BUBBLE, EVERYTHING], ids=name_of
)
def test_a_fault_that_does_not_recur_is_told_as_transient_with_its_tensors(ranks, data, layout):
    """And a healthy step computed again has nothing in it that is not finite."""
    once = Spoil("gradient", layer(4, "output.dense"), rank=_rank_of_last_layer(layout), times=1)
    first = assert_alike(
        ranks.run(layout.world, train_spoilt, data, RECIPE, layout, once, "run.anomalies.not_finite=skip")
    )
    (report,) = first.reports
    assert (report.attribution.origin, report.attribution.recurs) == (None, False)
    assert "a transient fault, as of memory or of a device" in report.message
    # The gradient came to the last layer, and to all before it; not to the heads behind.
    assert layer(4, "output.dense.weight") in report.attribution.tensors
    assert layer(0, "ln.weight") in report.attribution.tensors
    assert "bert.pooler.dense.weight" not in report.attribution.tensors
    assert (first.error, first.skipped) == (None, [False, True])


def _rank_of_last_layer(layout: Layout) -> int:
    """In a V of two stages each the first rank has the last stage."""
    return 0 if layout.schedule == "zb-v" else layout.world - 1


def test_a_sum_that_is_not_finite_though_its_terms_are_is_told_as_that(ranks, data):
    name = layer(1, "ln.weight")
    # Twice the largest float32 or so.
    spoil = Spoil("weight gradient", name, value=3e38)
    (outcome,) = ranks.run(1, train_spoilt, data, RECIPE, Layout(), spoil)
    (report,) = outcome.reports
    assert (report.attribution.origin, report.attribution.recurs) == (None, True)
    assert list(report.attribution.tensors) == [name]
    assert "The gradients of each microbatch are finite, but not their sums" in report.message


def test_a_record_is_strict_json_with_the_step_the_module_and_the_samples(ranks, data):
    spoil = Spoil("output", layer(1, "intermediate.dense"), sample=10)
    (outcome,) = ranks.run(1, train_spoilt, data, RECIPE, Layout(), spoil)
    record = json.loads(json.dumps(outcome.reports[0].record(), allow_nan=False))
    assert (record["step"], record["samples"], record["kind"]) == (2, [8, 15], "not_finite")
    assert (record["loss"], record["grad_norm"], record["consequence"]) == (None, None, "stopped")
    assert record["origin"] == {
        "what": "output", "name": spoil.name, "value": "nan", "ranks": [0], "microbatch": 1, "samples": [10, 11]
    }  # fmt: skip
    assert len(record["tensors"]) == record["num_tensors"] > 50


def what_is_left(settings: Path, layout: Layout) -> tuple[int, bool, bool, int]:
    """After a diagnosis: hooks on the model, who gets put-off gradients, and gradients that stay in parameters."""
    trainer = trainer_of(configure(settings, RECIPE, layout, "run.anomalies.not_finite=skip"), layout)
    before, own = _num_hooks(trainer), [stage.weight_gradients.deliver for stage in trainer.chunks]
    reports: list[object] = []
    trainer.on_anomaly = reports.append
    spoiler = Spoiler(Spoil("loss", "the model", rank=layout.world - 1, steps=(1,)), trainer)
    with spoiler.install():
        hooks_of_test = _num_hooks(trainer) - before
        trainer.train_step()
    kept = [stage.weight_gradients.deliver for stage in trainer.chunks] == own
    grads = [p.grad for stage in trainer.chunks for p in stage.parameters() if p.grad is not None]
    return _num_hooks(trainer) - before - hooks_of_test, kept, len(reports) == 1, len(grads)


def _num_hooks(trainer) -> int:
    modules = [module for stage in trainer.chunks for module in stage.modules()]
    parameters = [parameter for stage in trainer.chunks for parameter in stage.parameters()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules) + sum(
        len(p._backward_hooks or ()) for p in parameters
    )


def test_a_diagnosis_leaves_no_hooks_behind(ranks, data):
    assert ranks.run(2, what_is_left, data, ZERO_BUBBLE) == [(0, True, True, 0)] * 2


def test_a_weight_that_is_not_finite_ends_the_run_though_such_steps_are_to_be_skipped(ranks, data):
    spoil = Spoil("weight", layer(4, "ln.bias"))
    given = (data, replace(RECIPE, num_steps=3), Layout(), spoil, "run.anomalies.not_finite=skip")
    (outcome,) = ranks.run(1, train_spoilt, *given)
    assert (outcome.error_kind, outcome.num_steps) == ("NotFiniteError", 1)
    assert "and cannot be used. Start again, from the newest checkpoint" in outcome.error
