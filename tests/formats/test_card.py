"""The model card of an export says what is known of the model, and nothing else."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import MegatronBertForPreTraining

from megatron_bert_tp.config.dump import to_dict
from megatron_bert_tp.config.load import load_task
from megatron_bert_tp.formats.convert import from_huggingface, to_huggingface
from megatron_bert_tp.model.shape import HEADS
from tests.checkpoint.layouts import ODD, save
from tests.config.conftest import VALID_TASK, rendered
from tests.formats.test_tokenizer_files import UNCASED, vocabulary

SETTINGS = {
    "model": {"hidden_size": 16},
    "data": {
        "corpus": ["/home/me/secret/corpus", "other/novels"],
        "tokenizer": "/home/me/vocab.txt",
        "split": [96.0, 4.0, 0.0],
    },
    "objective": {"pairs": "nsp", "masking": {"probability": 0.15, "whole_words": True}},
    "optimizer": {"name": "adamw", "learning_rate": 0.0001, "global_batch": 64},
    "run": {"directory": "/home/me/runs/one"},
}
PIPELINES = {
    "MegatronBertModel": "feature-extraction",
    "MegatronBertForPreTraining": "fill-mask",
    "MegatronBertForMaskedLM": "fill-mask",
    "MegatronBertForCausalLM": "text-generation",
    "MegatronBertForSequenceClassification": "text-classification",
    "MegatronBertForMultipleChoice": "multiple-choice",
    "MegatronBertForTokenClassification": "token-classification",
    "MegatronBertForQuestionAnswering": "question-answering",
}
METRICS = [
    {"kind": "step", "step": 10, "loss": 6.5, "mlm_loss": 6.0, "seconds_left": 3.0},
    {"kind": "evaluation", "step": 10, "mlm_loss": 6.2},
    {"kind": "step", "step": 20, "loss": 4.5, "mlm_loss": 4.0, "seconds_left": 1.0, "tokens_per_second": 900.0},
    {"kind": "evaluation", "step": 20, "mlm_loss": 4.25, "mlm_accuracy": 0.3},
    {"kind": "step", "step": 30, "loss": 1.5, "mlm_loss": 1.0},
]


def front_matter(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---\n")[1])


def rows(text: str) -> dict[str, str]:
    """Cells of all tables."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: value for name, value in lines if value != "value"}


@pytest.fixture
def card(tmp_path) -> str:
    run = tmp_path / "run"
    attachments = {"vocab.txt": vocabulary(tmp_path / "data", UNCASED)}
    save(run / "checkpoints", ODD, 20, attachments=attachments, facts={"settings": SETTINGS, "samples": 640})
    lines = [json.dumps(record) for record in METRICS]
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], "cut off {", *lines[2:]]) + "\n")
    to_huggingface(run, tmp_path / "out")
    return (tmp_path / "out" / "README.md").read_text()


def test_the_front_matter_is_what_the_hub_reads(card):
    expected = {"library_name": "transformers", "pipeline_tag": "fill-mask"}
    assert front_matter(card) == {**expected, "tags": ["megatron-bert", "megatron_bert_tp"]}


def test_the_sizes_are_those_of_the_model(card, tmp_path):
    model = MegatronBertForPreTraining.from_pretrained(tmp_path / "out")
    assert rows(card)["parameters"] == f"{model.num_parameters():,}"
    assert rows(card)["vocabulary"] == "1003"
    assert rows(card)["number format"] == "float32"


def test_the_settings_and_the_step_of_the_training_are_told_but_no_paths(card):
    assert "after 20 optimizer steps" in card
    assert rows(card)["optimizer.learning_rate"] == "0.0001"
    assert rows(card)["objective.masking.probability"] == "0.15"
    assert rows(card)["data.split"] == "[96.0, 4.0, 0.0]"
    assert rows(card)["data.corpus"] == "corpus, novels"
    assert "/home" not in card


def card_of_task(folder: Path, *overrides: str, name: str = "classification") -> dict[str, str]:
    """Cells of the card of a run on a task with settings as the package writes them."""
    given = {"task.name": name, "model.weights": "/home/me/models/small", "data.train": "/home/me/train.csv"}
    settings = folder / "settings.yaml"
    settings.write_text(rendered({**VALID_TASK, **given}), encoding="utf-8")
    save(folder / "run" / "checkpoints", ODD, 20, facts={"settings": to_dict(load_task(settings, overrides))})
    to_huggingface(folder / "run", folder / "out")
    text = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert "/home" not in text
    return rows(text)


def test_the_card_of_a_task_tells_how_the_model_began_and_what_of_it_has_learned(tmp_path):
    told = card_of_task(tmp_path, "model.random_weights=true", "model.frozen_layers=3")
    assert {path: value for path, value in told.items() if path.startswith("model.")} == {
        "model.weights": "small",
        "model.random_weights": "true",
        "model.hidden_dropout_prob": "null",
        "model.attention_probs_dropout_prob": "null",
        "model.frozen_layers": "3",
    }
    assert told["data.train"] == "train.csv"


def test_the_card_of_a_task_leaves_out_what_the_run_has_not_read(tmp_path):
    told = card_of_task(tmp_path)
    unread = {"task.separator", "task.columns.choices", "task.overlap", "task.n_best", "task.scheme"}
    unread |= {"data.draw", "optimizer.momentum", "optimizer.loss_scale.initial", "optimizer.loss_scale.minimum"}
    assert unread.isdisjoint(told)
    assert {"task.columns.text", "task.labels", "task.balanced", "optimizer.beta1"} <= told.keys()


def test_the_card_of_a_task_tells_what_that_task_and_that_precision_read(tmp_path):
    given = "optimizer.precision=float16", "optimizer.name=sgd", "task.overlap=32", "data.most_train=5"
    told = card_of_task(tmp_path, *given, name="squad")
    read = {"task.overlap", "task.n_best", "optimizer.loss_scale.initial", "optimizer.momentum", "data.draw"}
    assert read <= told.keys()
    assert {"task.columns.text", "task.labels", "task.class_weights", "optimizer.beta1"}.isdisjoint(told)


def test_the_last_metrics_are_those_of_the_step_and_not_later_ones(card):
    assert (
        "Last step on record, at step 20:\n\n| metric | value |\n|---|---|\n| loss | 4.5 |\n| mlm_loss | 4.0 |"
        in card
    )
    assert "Last evaluation on record, at step 20:\n\n| metric | value |\n|---|---|\n| mlm_loss | 4.25 |" in card
    assert "1.5" not in card
    assert "seconds_left" not in card


def test_it_shows_how_to_load_the_class_that_it_is(card):
    assert "from transformers import AutoTokenizer, MegatronBertForPreTraining\n" in card
    assert 'model = MegatronBertForPreTraining.from_pretrained("DIRECTORY")' in card


@pytest.mark.parametrize("architecture", HEADS)
def test_an_imported_model_has_a_card_without_training(saved, tmp_path, architecture):
    from_huggingface(saved(architecture=architecture), tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"# {architecture}\n" in text
    assert f"from transformers import {architecture}\n" in text
    assert "## Training" not in text
    assert front_matter(text).get("pipeline_tag") == PIPELINES.get(architecture)
    assert ("labels" in rows(text)) == architecture.endswith(("SequenceClassification", "TokenClassification"))


@pytest.mark.usefixtures("card")
def test_the_card_is_a_plain_file_of_the_export(tmp_path):
    assert Path(tmp_path / "out" / "README.md").stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (
        tmp_path / "out" / "config.json"
    ).stat().st_mode
