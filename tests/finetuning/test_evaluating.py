"""A model that has learned a task is measured alike wherever and however often it is measured."""

import csv
import json

import pytest

from megatron_bert_tp.config.task_table import Kind
from tests.finetuning.cases import first_lines
from tests.finetuning.runs import (
    EVALUATE,
    FINETUNE,
    evaluations_of,
    measure,
    name_of,
    predictions_of,
    products_of,
    result_of,
    run_rank,
    tune,
)
from tests.sources import real_data
from tests.support import Layout
from tests.training.runs import start, succeeded

SHORT = "optimizer.steps=6", "run.evaluate_every=3"
EXACT = "optimizer.precision=float64"


@pytest.fixture(scope="module")
def tuned_of(ranks, files_of, tmp_path_factory):
    """Folder of a short run of a kind in one process, in float32 as an export is."""
    known = {}

    def tuned_of(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp("tuned") / "run"
            known[kind] = tune(ranks, files_of(kind).settings, folder, *SHORT, "optimizer.precision=float32")
        return known[kind]

    return tuned_of


def without_loss(metrics):
    """Metrics of predictions alone: the loss is of all parts together."""
    return {name: value for name, value in metrics.items() if name != "loss"}


def rounded(record):
    """A record with numbers to nine places."""
    return json.loads(json.dumps(record), parse_float=lambda text: round(float(text), 9))


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (Kind.CLASS, Layout(data=3)),
        (Kind.NUMBER, Layout(data=2)),
        (Kind.TAGS, Layout(data=3, packing="packed")),
        (Kind.ANSWER, Layout(data=2, packing="bins")),
        (Kind.CHOICE, Layout(data=3)),
        (Kind.CLASSES, Layout(data=2, pipeline=2)),
    ],
    ids=name_of,
)
def test_every_example_is_predicted_once_in_file_order(ranks, files_of, tuned_of, tmp_path, kind, layout):
    """13 examples (10 of choices, 5 of answers) divide by neither 2 nor 3."""
    files, model = files_of(kind), tuned_of(kind) / "model"
    alone = measure(ranks, files.settings, model, tmp_path / "alone", EXACT)
    spread = measure(ranks, files.settings, model, tmp_path / "spread", EXACT, layout=layout)
    expected, found = (predictions_of(tmp_path / name) for name in ("alone", "spread"))
    assert len(expected) > 4
    assert len({record["id"] for record in expected}) == len(expected)
    assert [record["id"] for record in found] == [record["id"] for record in expected]
    assert rounded(found) == rounded(expected)
    assert spread["validation"] == pytest.approx(alone["validation"], abs=1e-12)


@pytest.mark.parametrize("kind", Kind, ids=name_of)
def test_the_export_has_the_metrics_of_its_run_at_another_layout_too(ranks, files_of, tuned_of, tmp_path, kind):
    folder = tuned_of(kind)
    layout = Layout(tensor=2) if kind in (Kind.CLASS, Kind.ANSWER, Kind.TAGS) else Layout(pipeline=2)
    given = "optimizer.precision=float32", "data.train=null"
    found = measure(ranks, files_of(kind).settings, folder / "model", tmp_path / "run", *given, layout=layout)
    result = result_of(folder)
    (best,) = (row for row in evaluations_of(folder) if row["step"] == result["best_step"])
    expected = {"loss": best["loss"], **result["metrics"]["validation"]}
    assert found["validation"] == pytest.approx(expected, abs=1e-5)  # float32: correlations of 13 numbers
    assert {name: best[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert [record["id"] for record in predictions_of(tmp_path / "run")] == [
        record["id"] for record in predictions_of(folder)
    ]


def test_the_command_evaluates_a_checkpoint_too(files_of, tuned_of, tmp_path):
    """Under torchrun, from the checkpoint of the best step."""
    folder = tuned_of(Kind.NUMBER)
    best = folder / "checkpoints" / f"step_{result_of(folder)['best_step']:08d}"
    told = succeeded(
        start(
            EVALUATE,
            files_of(Kind.NUMBER).settings,
            f"model.weights={best}",
            f"run.directory={tmp_path}/run",
            "optimizer.precision=float32",
            processes=2,
        )
    )
    assert "validation: pearson" in told
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    expected = result_of(folder)["metrics"]["validation"]
    assert without_loss(found["validation"]) == pytest.approx(expected, abs=1e-5)
    assert "submission/validation/STS-B.tsv" in products_of(tmp_path / "run")


def test_several_files_are_measured_together_and_one_by_one(ranks, files_of, tuned_of, tmp_path):
    files, model = files_of(Kind.CLASS), tuned_of(Kind.CLASS) / "model"
    lines = files.validation.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = {"odd": lines[:1] + lines[1:6], "even": lines[:1] + lines[6:]}
    for name, rows in parts.items():
        (tmp_path / f"{name}.tsv").write_text("".join(rows), encoding="utf-8")
    paths = {name: str(tmp_path / f"{name}.tsv") for name in parts}
    both = f"data.validation={json.dumps(list(paths.values()))}"
    together = measure(ranks, files.settings, model, tmp_path / "both", both)["validation"]
    whole = without_loss(measure(ranks, files.settings, model, tmp_path / "whole")["validation"])
    assert {name: together[name] for name in whole} == whole
    for name, path in paths.items():
        alone = measure(ranks, files.settings, model, tmp_path / name, f"data.validation={path}")["validation"]
        assert {metric: together[f"{metric}_{name}"] for metric in whole} == without_loss(alone)
    ids = [record["id"] for record in predictions_of(tmp_path / "both")]
    assert len(set(ids)) == 13


def test_test_data_without_labels_are_predicted_for_the_benchmark(ranks, files_of, tmp_path):
    given = first_lines(real_data("glue/MRPC/test.tsv"), tmp_path / "test.tsv", 8)
    folder = tune(
        ranks, files_of(Kind.CLASS).settings, tmp_path / "run", *SHORT, f"data.test={given}", layout=Layout(data=2)
    )
    assert result_of(folder)["metrics"]["test"] == {}
    records = predictions_of(folder, "test")
    assert len(records) == 7
    assert all("expected" not in record for record in records)
    rows = (folder / "submission" / "test" / "MRPC.tsv").read_text().splitlines()
    names = ["not_equivalent", "equivalent"]
    assert rows == ["index\tprediction", *(f"{n}\t{names.index(each['label'])}" for n, each in enumerate(records))]


@pytest.mark.parametrize("named", [False, True], ids=["by the model", "by the settings"])
def test_labels_that_look_made_up_are_those_of_the_model(message_of, small_model, tmp_path, named):
    path = tmp_path / "train.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([f"word {n}", f"LABEL_{n % 2}"] for n in range(8))])
    settings = tmp_path / "task.yaml"
    settings.write_text(f"""
model: {{weights: "{small_model}"}}
task: {{name: classification}}
data: {{train: "{path}", validation: "{path}", sequence_length: 16}}
optimizer: {{global_batch: 4}}
parallel: {{microbatch: 4}}
run: {{directory: "{tmp_path}/run", device: cpu}}
""")
    assert message_of(FINETUNE, settings, *SHORT)[0] == 0
    given = ["task.labels=[LABEL_0, LABEL_1]"] if named else []
    code, told = message_of(
        EVALUATE, settings, f"model.weights={tmp_path}/run", f"run.directory={tmp_path}/out", *given
    )
    assert code == 0, told
    assert predictions_of(tmp_path / "out") == predictions_of(tmp_path / "run")


def test_a_loss_without_the_weights_of_its_training_is_told(ranks, files_of, tuned_of, tmp_path):
    given = f"model.weights={tuned_of(Kind.CLASS)}", f"run.directory={tmp_path}/out"
    for balanced in ("true", "false"):
        settings = files_of(Kind.CLASS).settings, (*given, f"task.balanced={balanced}")
        (told,) = ranks.run(1, run_rank, "evaluate", *settings)
        assert ("the loss is not balanced: task.balanced counts the classes" in told) is (balanced == "true")


def test_the_test_part_is_answered_with_the_threshold_of_the_validation_part(ranks, files_of, tmp_path):
    """The same questions in both: F1 of the one is the best F1 of the other, and not that at a threshold of 0."""
    content = json.loads(real_data("squad/dev-v2.0.first1050.json").read_text(encoding="utf-8"))
    content["data"] = content["data"][:1]
    content["data"][0]["paragraphs"] = content["data"][0]["paragraphs"][:2]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    files = f"data.train={path}", f"data.validation={path}", f"data.test={path}"
    folder = tune(ranks, files_of(Kind.ANSWER).settings, tmp_path / "run", *SHORT, *files)
    validation, test = (result_of(folder)["metrics"][part] for part in ("validation", "test"))
    assert validation["best_threshold"] != 0
    assert validation["best_f1"] > validation["f1"]
    assert test["f1"] == validation["best_f1"]
    assert [row["answer"] for row in predictions_of(folder, "test")] != [
        row["answer"] for row in predictions_of(folder)
    ]
