"""What a run exports is a model of `transformers` with label names, and predicts as its run has done."""

import json
import re

import pytest
import torch
import transformers
from transformers import AutoTokenizer, pipeline

import megatron_bert_tp
from megatron_bert_tp.config.task_table import ARCHITECTURES, Kind
from tests.finetuning.cases import TOPICS, first_lines
from tests.finetuning.features import part_of, tag_names
from tests.finetuning.reference import collate, logits_of
from tests.finetuning.runs import predictions_of, result_of, tune
from tests.prediction.directories import predict
from tests.prediction.test_pipelines import assert_close, plain
from tests.sources import real_data

SHORT = "optimizer.steps=6", "run.evaluate_every=3", "optimizer.precision=float32"
# Two float32 programs of the same two layers.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def tuned_of(ranks, files_of, tmp_path_factory):
    known = {}

    def tuned_of(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp("exported") / "run"
            known[kind] = tune(ranks, files_of(kind).settings, folder, *SHORT)
        return known[kind]

    return tuned_of


def names_of(kind, files):
    if kind is Kind.TAGS:
        return tag_names(files.train)
    return {Kind.CLASS: ("not_equivalent", "equivalent"), Kind.CLASSES: tuple(sorted(TOPICS))}.get(kind)


def loaded(kind, folder, library=transformers):
    return getattr(library, ARCHITECTURES[kind]).from_pretrained(folder / "model").eval()


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_transformers_loads_the_class_whole_and_gives_our_logits(files_of, tuned_of, kind):
    folder, files = tuned_of(kind), files_of(kind)
    model, report = getattr(transformers, ARCHITECTURES[kind]).from_pretrained(
        folder / "model", output_loading_info=True
    )
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    names = names_of(kind, files)
    if names is not None:
        assert model.config.id2label == dict(enumerate(names))
        assert model.config.label2id == {name: number for number, name in enumerate(names)}
    own = getattr(megatron_bert_tp, ARCHITECTURES[kind]).from_pretrained(folder / "model").eval()
    part = part_of(kind, files, files.validation, names or ())
    batch = collate(kind, part.samples)
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    with torch.no_grad():
        theirs, ours = model.eval()(**inputs), own(**inputs)
    for name in ("start_logits", "end_logits") if kind is Kind.ANSWER else ("logits",):
        torch.testing.assert_close(ours[name], theirs[name], atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("kind", [Kind.CLASS, Kind.CLASSES, Kind.NUMBER, Kind.CHOICE])
def test_predictions_of_the_run_are_those_of_transformers_on_the_export(files_of, tuned_of, kind):
    folder, files = tuned_of(kind), files_of(kind)
    model, names = loaded(kind, folder), names_of(kind, files)
    samples = part_of(kind, files, files.validation, names or ()).samples
    records = predictions_of(folder)
    assert len(records) == len(samples)
    for record, sample in zip(records, samples, strict=True):
        logits = torch.from_numpy(logits_of(kind, model, sample))
        if kind is Kind.NUMBER:
            assert record["value"] == pytest.approx(logits.item(), abs=CLOSE)
            continue
        shares = logits.sigmoid() if kind is Kind.CLASSES else logits.softmax(-1)
        found = record["scores"]
        expected = shares.tolist() if names is None else dict(zip(names, shares.tolist(), strict=True))
        assert found == pytest.approx(expected, abs=CLOSE)


@pytest.fixture(scope="module")
def sentiment(ranks, small_model, tmp_path_factory):
    """Run on the first lines of SST-2, and sentences of its validation file."""
    folder = tmp_path_factory.mktemp("sst-2")
    files = [
        first_lines(real_data(f"glue/SST-2/{name}.tsv"), folder / f"{name}.tsv", count)
        for name, count in (("train", 33), ("dev", 10))
    ]
    settings = folder / "task.yaml"
    settings.write_text(
        f"""
model: {{weights: "{small_model}"}}
task: {{name: sst-2}}
data: {{train: "{files[0]}", validation: "{files[1]}", sequence_length: 64}}
optimizer: {{global_batch: 8, steps: 8, learning_rate: 1e-3, seed: 7}}
parallel: {{microbatch: 4}}
run: {{directory: "{folder}/unused", device: cpu}}
"""
    )
    lines = files[1].read_text(encoding="utf-8").splitlines()[1:]
    return tune(ranks, settings, folder / "run"), [line.split("\t")[0].strip() for line in lines]


def test_predict_classifies_as_the_pipeline_does_and_as_the_run_did(sentiment):
    folder, texts = sentiment
    classify = pipeline("text-classification", model=str(folder / "model"), device="cpu", top_k=None)
    for text, record, told in zip(
        texts, predict(folder / "model", "classification", texts), predictions_of(folder), strict=True
    ):
        expected = classify(text)[0] if isinstance(classify(text)[0], list) else classify(text)
        assert {row["label"] for row in expected} == {"negative", "positive"}
        assert_close(record["labels"], expected)
        assert told["scores"] == pytest.approx({row["label"]: row["score"] for row in expected}, abs=CLOSE)
        assert told["label"] == expected[0]["label"]


def test_predict_finds_entities_as_the_pipeline_does(files_of, tuned_of):
    folder, files = tuned_of(Kind.TAGS), files_of(Kind.TAGS)
    tell = pipeline(
        "token-classification", model=str(folder / "model"), device="cpu", aggregation_strategy="simple"
    )
    texts = [" ".join(record["words"]) for record in predictions_of(folder)]
    seen = set()
    for text, record in zip(texts, predict(folder / "model", "ner", texts), strict=True):
        expected = [
            {("entity" if key == "entity_group" else key): value for key, value in plain(span).items()}
            for span in tell(text)
        ]
        assert_close(record["entities"], expected)
        seen |= {span["entity"] for span in record["entities"]}
    assert seen
    assert seen <= {name[2:] for name in tag_names(files.train)}


def test_predict_answers_as_it_does_on_the_same_model_written_by_transformers(files_of, tuned_of, tmp_path):
    """The directory alone differs; predict itself is compared with golden answers in tests/prediction."""
    folder = tuned_of(Kind.ANSWER)
    loaded(Kind.ANSWER, folder).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path)
    content = json.loads(files_of(Kind.ANSWER).validation.read_text(encoding="utf-8"))
    asked = [
        {"question": each["question"], "context": paragraph["context"]}
        for paragraph in content["data"][0]["paragraphs"]
        for each in paragraph["qas"]
    ]
    ours, theirs = (predict(place, "question-answering", asked) for place in (folder / "model", tmp_path))
    assert_close(ours, theirs)
    for line, record in zip(asked, ours, strict=True):
        assert line["context"][record["start"] : record["end"]] == record["answer"] != ""


def test_the_card_tells_the_metrics_of_the_best_step(tuned_of):
    folder = tuned_of(Kind.NUMBER)
    card, result = (folder / "model" / "README.md").read_text(encoding="utf-8"), result_of(folder)
    assert f"Last evaluation on record, at step {result['best_step']}:" in card
    for name, value in result["metrics"]["validation"].items():
        (told,) = re.findall(rf"^\| {name} \| (\S+) \|$", card, flags=re.MULTILINE)
        assert float(told) == pytest.approx(value, abs=CLOSE)
