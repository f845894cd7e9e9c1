"""Where a run may begin: pretraining of this package, a Hugging Face directory, a fine-tuned model, or anew."""

import csv

import pytest
import torch
from safetensors.torch import load_file

from megatron_bert_tp.config.task_table import Kind
from megatron_bert_tp.model.initialisation import initial_tensor
from tests.faults.runs import tensors_of
from tests.finetuning.reference import DEVIATION, SEED, build_model, first_samples, loss_of
from tests.finetuning.runs import exported, losses_of, tune
from tests.training.runs import pretrain, succeeded

# A step of SGD that is 0 in float32: what is exported is what it began with.
STILL = (
    "optimizer.name=sgd",
    "optimizer.learning_rate=1e-60",
    "optimizer.weight_decay=0",
    "optimizer.precision=float32",
    "optimizer.steps=1",
    "data.validation=null",
    "run.evaluate_every=null",
)


def encoder_of(tensors):
    return {name: value for name, value in tensors.items() if name.startswith("bert.")}


def assert_same_encoder(found, expected):
    assert encoder_of(found).keys() == encoder_of(expected).keys()
    assert [name for name in encoder_of(found) if not torch.equal(found[name], expected[name])] == []


def assert_new_head(found, *, deviation=DEVIATION):
    for name in ("classifier.weight", "classifier.bias"):
        expected = initial_tensor(name, tuple(found[name].shape), seed=SEED, deviation=deviation)
        assert torch.equal(found[name], expected)


def test_a_hugging_face_directory_gives_its_encoder_and_a_new_head(ranks, files_of, small_model, tmp_path):
    found = exported(tune(ranks, files_of(Kind.CLASS).settings, tmp_path / "run", *STILL))
    assert_same_encoder(found, load_file(small_model / "model.safetensors"))
    assert_new_head(found)


@pytest.fixture(scope="module")
def learned(ranks, files_of, tmp_path_factory):
    """Folder of a run that has moved all weights, the head too."""
    given = "optimizer.steps=4", "run.evaluate_every=4", "optimizer.precision=float32"
    return tune(ranks, files_of(Kind.CLASS).settings, tmp_path_factory.mktemp("learned") / "run", *given)


@pytest.mark.parametrize("place", ["model", "."], ids=["export", "folder of the run"])
def test_a_model_of_the_same_task_keeps_its_head(ranks, files_of, learned, tmp_path, place):
    given = f"model.weights={learned / place}"
    found = exported(tune(ranks, files_of(Kind.CLASS).settings, tmp_path / "run", *STILL, given))
    assert_same_encoder(found, exported(learned))
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(found[name], exported(learned)[name])


def table(folder, *labels):
    """CSV file with a row for each label."""
    path = folder / "train.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("text", "label"), *((f"w{row} w{row + 7}", each) for row, each in enumerate(labels))])
    return path


def settings_of_table(folder, weights, *labels):
    settings = folder / "task.yaml"
    settings.write_text(
        f"""
model: {{weights: "{weights}"}}
task: {{name: classification}}
data: {{train: "{table(folder, *labels)}", sequence_length: 16}}
optimizer: {{global_batch: 3, steps: 1, seed: 7}}
parallel: {{microbatch: 3}}
run: {{directory: "{folder}/unused", device: cpu}}
"""
    )
    return settings


def test_a_model_of_other_labels_keeps_its_encoder_and_gets_a_new_head(ranks, learned, tmp_path):
    settings = settings_of_table(tmp_path, learned / "model", "a", "b", "c")
    found = exported(tune(ranks, settings, tmp_path / "run", *STILL))
    assert found["classifier.weight"].shape == (3, 32)
    assert_same_encoder(found, exported(learned))
    assert_new_head(found)


def test_as_many_labels_of_other_names_get_a_new_head(ranks, learned, tmp_path):
    """A row of the old head would stand for another class."""
    settings = settings_of_table(tmp_path, learned / "model", "a", "b", "a")
    found = exported(tune(ranks, settings, tmp_path / "run", *STILL))
    assert_same_encoder(found, exported(learned))
    assert_new_head(found)


def test_a_pretraining_run_of_this_package_gives_its_encoder_and_pooler(ranks, data, tmp_path):
    run = tmp_path / "pretraining"
    succeeded(pretrain(data, f"run.directory={run}", "optimizer.steps=2", "run.evaluation_samples=0",
                       "optimizer.warmup_steps=0"))  # fmt: skip
    settings = settings_of_table(tmp_path, run, "a", "b", "c")
    found = exported(tune(ranks, settings, tmp_path / "run", *STILL))
    weights = {name.removeprefix("weight/"): each for name, each in tensors_of(run, 2).items()}
    assert_same_encoder(found, weights)
    assert_new_head(found, deviation=0.02)
    assert (tmp_path / "run" / "model" / "vocab.txt").read_bytes() == (run / "vocab.txt").read_bytes()


def test_random_weights_are_a_function_of_the_seed_alone(ranks, files_of, tmp_path):
    settings, given = files_of(Kind.CLASS).settings, (*STILL, "model.random_weights=true")
    first, again, other = (
        exported(tune(ranks, settings, tmp_path / name, *given, f"optimizer.seed={seed}"))
        for name, seed in (("first", 7), ("again", 7), ("other", 8))
    )
    for name, value in first.items():
        expected = initial_tensor(name, tuple(value.shape), seed=7, deviation=DEVIATION)
        if name == "bert.embeddings.word_embeddings.weight":
            expected[0] = 0  # [PAD]
        assert torch.equal(value, expected), name
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == (value.dim() == 1), name


def test_the_loss_of_random_weights_is_that_of_the_weights_as_transformers_has_them(ranks, files_of, tmp_path):
    files = files_of(Kind.CLASS)
    model = build_model(Kind.CLASS, files)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_tensor(name, tuple(parameter.shape), seed=SEED, deviation=DEVIATION))
        model.bert.embeddings.word_embeddings.weight[0] = 0
        expected = loss_of(Kind.CLASS, model, first_samples(Kind.CLASS, files, 8), masks_padding=True).item()
    given = "model.random_weights=true", "optimizer.steps=1", "data.validation=null", "run.evaluate_every=null"
    losses = losses_of(tune(ranks, files.settings, tmp_path / "run", *given))
    assert losses == [pytest.approx(expected, rel=1e-12)]  # float64
