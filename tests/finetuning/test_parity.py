"""Fine-tuning at any layout follows a plain `transformers` + PyTorch loop, for a task of each kind."""

from pathlib import Path

import pytest

from megatron_bert_tp.config.task_table import Kind
from tests.finetuning.cases import Files, write_model, write_task
from tests.finetuning.reference import Followed, follow
from tests.finetuning.runs import FINETUNE, evaluations_of, layout_settings, losses_of, tune
from tests.support import Layout
from tests.training.runs import start, succeeded

# Both loops compute in float64 (rounding of 1e-16 grows by some orders in 30 steps of AdamW), but clip_grad_norm_
# adds 1e-6 to the norm that it divides by, which AdamW's epsilon lets through a little.
TOLERANCE = 1e-7
LAYOUTS = {
    "one process": Layout(),
    "tensor 2": Layout(tensor=2),
    "pipeline 2": Layout(pipeline=2),
    "tensor 2 x pipeline 2": Layout(tensor=2, pipeline=2),
    "data 2": Layout(data=2),
    "bins": Layout(packing="bins"),
    "packed": Layout(packing="packed"),
    "data 2, bins": Layout(data=2, packing="bins"),
    "data 2, packed": Layout(data=2, packing="packed"),
    "data 2, sharded optimizer": Layout(data=2, shards=True),
}
# Each kind in two layouts, each layout for two kinds or more; the others are slow.
QUICK = {
    Kind.CLASS: ("one process", "tensor 2 x pipeline 2", "data 2, bins"),
    Kind.CLASSES: ("tensor 2", "data 2", "data 2, packed"),
    Kind.NUMBER: ("pipeline 2", "data 2", "packed"),
    Kind.CHOICE: ("tensor 2 x pipeline 2", "data 2", "data 2, packed"),
    Kind.ANSWER: ("pipeline 2", "tensor 2", "packed", "data 2, bins"),
    Kind.TAGS: ("one process", "tensor 2", "data 2, packed", "data 2, sharded optimizer"),
}
MATRIX = [
    pytest.param(kind, layout, marks=() if layout in QUICK[kind] else pytest.mark.slow, id=f"{kind.name}-{layout}")
    for kind in Kind
    for layout in LAYOUTS
]


def assert_follows(folder: Path, followed: Followed) -> None:
    assert losses_of(folder) == pytest.approx(followed.losses, abs=TOLERANCE)
    found = evaluations_of(folder)
    assert [row["step"] for row in found] == [5, 10, 15, 20, 25, 30]
    for row, expected in zip(found, followed.evaluations, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=TOLERANCE)


def test_the_loop_learns_and_its_metrics_are_worth_a_comparison(followed_of):
    """No metric is 0 or 1 in all evaluations, but that no answer of SQuAD is quite right."""
    for kind in Kind:
        followed = followed_of(kind)
        assert sum(followed.losses[-5:]) < sum(followed.losses[:5])
        for name in set(followed.evaluations[0]) - {"exact_match"}:
            assert any(0 < abs(row[name]) < 1 or name == "loss" for row in followed.evaluations), (kind, name)


@pytest.mark.parametrize(("kind", "layout"), MATRIX)
def test_thirty_steps_equal_a_plain_loop_over_transformers(ranks, files_of, followed_of, tmp_path, kind, layout):
    folder = tune(ranks, files_of(kind).settings, tmp_path / "run", layout=LAYOUTS[layout])
    assert_follows(folder, followed_of(kind))


# Of each kind one layout; a launch takes its time, and so all but one are slow.
LAUNCHED = {
    Kind.CLASS: "tensor 2",
    Kind.CLASSES: "pipeline 2",
    Kind.NUMBER: "tensor 2 x pipeline 2",
    Kind.CHOICE: "pipeline 2",
    Kind.ANSWER: "data 2",
    Kind.TAGS: "data 2",
}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(kind, layout, marks=() if kind is Kind.ANSWER else pytest.mark.slow, id=kind.name)
        for kind, layout in LAUNCHED.items()
    ],
)
def test_the_command_under_torchrun_does_so_too(files_of, followed_of, tmp_path, kind, layout):
    spread, folder = LAYOUTS[layout], tmp_path / "run"
    settings = layout_settings(spread)
    succeeded(
        start(FINETUNE, files_of(kind).settings, f"run.directory={folder}", *settings, processes=spread.world)
    )
    assert_follows(folder, followed_of(kind))


def test_an_interleaved_pipeline_follows_the_loop(ranks, tmp_path):
    """Four layers as four stages, two of them on each rank."""
    weights = tmp_path / "weights"
    weights.mkdir()
    files = write_task(Kind.CLASS, tmp_path, write_model(weights, num_layers=4))
    layout = Layout(pipeline=2, schedule="interleaved", virtual=2)
    assert_follows(tune(ranks, files.settings, tmp_path / "run", layout=layout), follow(Kind.CLASS, files))


def test_answers_in_rows_without_padding_have_the_loss_of_transformers_itself(ranks, files_of, tmp_path):
    """One window a step: in the loop none is padded, and ours is padded to a multiple of 8."""
    files: Files = files_of(Kind.ANSWER)
    alone = "optimizer.global_batch=1", "parallel.microbatch=1", "data.validation=null", "run.evaluate_every=null"
    folder = tune(ranks, files.settings, tmp_path / "run", *alone)
    followed = follow(Kind.ANSWER, files, global_batch=1, masks_padding=False)
    assert losses_of(folder) == pytest.approx(followed.losses, abs=TOLERANCE)
