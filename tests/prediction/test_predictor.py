"""Batches, order and bad lines do not change an answer; what a model cannot do is refused."""

import json
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from megatron_bert_tp.errors import ConfigError, DataError, FormatError
from megatron_bert_tp.formats.convert import from_huggingface
from megatron_bert_tp.model.shape import HEADS
from megatron_bert_tp.prediction.arguments import TASKS as NAMES
from megatron_bert_tp.prediction.batches import Batch, by_length
from megatron_bert_tp.prediction.predictor import Predictor
from megatron_bert_tp.prediction.samples import LONGEST_LINE
from megatron_bert_tp.prediction.stream import lines_of
from megatron_bert_tp.prediction.tasks import TASKS
from tests.prediction.directories import ENTITIES, answers, make_directory, named, predict
from tests.prediction.texts import LONG, PAIRS, TEXTS, VOCABULARIES

MASKED = "MegatronBertForMaskedLM"


def numbers_of(value: object) -> list[float]:
    if isinstance(value, float):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [number for each in inner for number in numbers_of(each)]


def without_numbers(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_numbers(each) for each in value]
    return None if isinstance(value, float) else value


PAIR_LINES = ["\t".join(pair) for pair in PAIRS]
LINES = {
    "fill-mask": (MASKED, [f"[MASK] {text}" for text in TEXTS]),
    "next-sentence": ("MegatronBertForPreTraining", PAIR_LINES),
    "classification": ("MegatronBertForSequenceClassification", [*TEXTS, *PAIR_LINES, LONG]),
    "ner": ("MegatronBertForTokenClassification", [*TEXTS, LONG]),
    "question-answering": (
        "MegatronBertForQuestionAnswering",
        [*PAIR_LINES, f"where?\t{LONG}", "who?\tthe river"],
    ),
    "multiple-choice": (
        "MegatronBertForMultipleChoice",
        [{"prompt": TEXTS[0], "choices": TEXTS[:2]}, {"prompt": "a", "choices": TEXTS}],
    ),
    "features": ("MegatronBertModel", TEXTS),
}


@pytest.mark.parametrize("task", LINES)
def test_padding_and_order_change_no_answer(directory_of, task):
    architecture, lines = LINES[task]
    settings = named(*ENTITIES) if task == "ner" else {}
    predictor = Predictor.open(directory_of(architecture, **settings), task, dtype=torch.float64)
    alone = answers(replace(predictor, batch_size=1), lines, window=1)
    together = answers(replace(predictor, batch_size=5), [*reversed(lines), *lines])
    for found in (list(reversed(together[: len(lines)])), together[len(lines) :]):
        assert without_numbers(found) == without_numbers(alone)
        # Of a sum of at most some thousand products of numbers of size 10, in float64.
        assert numbers_of(found) == pytest.approx(numbers_of(alone), abs=1e-11)
    assert len({json.dumps(record) for record in alone}) == len(lines)


def test_rows_of_like_length_go_together_and_padding_is_masked(directory_of):
    encoder = Predictor.open(directory_of(MASKED), "fill-mask").setup.encoder
    rows = [encoder.row("a " * length) for length in (5, 1, 9, 2, 6)]
    assert by_length(rows, 2) == [[1, 3], [0, 4], [2]]
    batch = Batch.of([rows[1], rows[3]], pad_id=0)
    assert batch.input_ids[0, 3:].tolist() == [0]
    assert batch.attention_mask.tolist() == [[True, True, True, False], [True] * 4]
    assert Batch.of([rows[1]], pad_id=0).attention_mask is None


def test_bad_lines_stand_in_their_place_and_the_rest_is_answered(directory_of):
    good = ["[MASK] river", "the [MASK]"]
    lines = ["", good[0], "no mask", "{bad", good[1], f"{LONG} [MASK]"]
    found = predict(directory_of(MASKED), "fill-mask", lines)
    assert [record.get("line") for record in found] == [1, None, 3, 4, None, 6]
    assert [found[1], found[4]] == predict(directory_of(MASKED), "fill-mask", good)
    assert found[2]["error"].startswith("the text has no [MASK]; write [MASK], in capital letters")
    assert found[5]["error"].startswith("no [MASK] in the first 160 tokens")
    assert all(record.keys() == {"line", "error"} for record in found if "line" in record)


def test_the_id_of_a_line_comes_back(directory_of):
    (record,) = predict(directory_of(MASKED), "fill-mask", [{"text": "[MASK]", "id": {"a": [7]}}])
    assert record["id"] == {"a": [7]}


def test_what_cannot_be_written_again_is_an_error_of_its_line_only(directory_of):
    bad = ["1e999", "NaN", '"\\ud800"', '{"a": [-Infinity]}']
    lines = ["a [MASK]", *(f'{{"text": "a [MASK]", "id": {value}}}' for value in bad), "b [MASK]"]
    found = predict(directory_of(MASKED), "fill-mask", lines)
    assert [record.get("line") for record in found] == [None, 2, 3, 4, 5, None]
    assert [found[0], found[5]] == predict(directory_of(MASKED), "fill-mask", [lines[0], lines[5]])


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_a_line_that_is_too_long_is_cut_and_the_next_begins_at_its_place(mark, end):
    for longer in range(10):
        for size in (LONGEST_LINE - 5 + longer, 3 * LONGEST_LINE + longer):
            text = "a" * size
            first, *others = lines_of(BytesIO(f"{mark}{text}{end}{'b' * bool(end)}".encode()))
            assert others == ([b"b"] if end else [])
            assert first == text.encode() if size <= LONGEST_LINE else LONGEST_LINE < len(first) < LONGEST_LINE + 9


@pytest.mark.parametrize(
    "labels",
    [
        '{"0": 1, "1": null}',
        '{"0": {"a": 1}, "1": [1]}',
        '{"0": "\\ud800", "1": "b"}',
        '{"a": "x", "b": "y"}',
        '["a", "b"]',
    ],
)
def test_labels_that_are_no_names_are_refused(directory_of, tmp_path, labels):
    folder = tmp_path / "model"
    shutil.copytree(directory_of("MegatronBertForTokenClassification"), folder)
    settings = json.loads((folder / "config.json").read_text()) | {"id2label": json.loads(labels)}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises((FormatError, ConfigError), match="id2label"):
        Predictor.open(folder, "ner")


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json"])
def test_a_bad_tokenizer_is_told_by_its_own_path(directory_of, tmp_path, name):
    folder = tmp_path / "model"
    ignored = shutil.ignore_patterns("tokenizer.json", "tokenizer_config.json")
    shutil.copytree(directory_of(MASKED), folder, ignore=ignored)
    (folder / name).write_text("a\na\n")
    with pytest.raises(DataError) as caught:
        Predictor.open(folder, "fill-mask")
    assert str(caught.value).startswith(f"{folder / name}: ")


def test_a_context_without_tokens_and_a_model_without_numbers_are_errors_of_the_line(directory_of):
    directory = directory_of("MegatronBertForQuestionAnswering")
    asked = [{"question": "who?", "context": "\u200b"}]
    assert predict(directory, "question-answering", asked) == [
        {"line": 1, "error": "the context has no token; give a text with letters"}
    ]
    predictor = Predictor.open(directory, "question-answering")
    with torch.no_grad():
        predictor.model.get_parameter("qa_outputs.bias")[0] = torch.nan
    (record,) = answers(predictor, ["who?\tthe river"])
    assert record["error"].startswith("the model gives nan or infinite numbers")


def test_every_class_does_what_it_can_and_is_refused_otherwise(tmp_path, vocabulary_file):
    can = {
        "MegatronBertForPreTraining": {"fill-mask", "next-sentence"},
        MASKED: {"fill-mask"},
        "MegatronBertForNextSentencePrediction": {"next-sentence"},
        "MegatronBertForSequenceClassification": {"classification"},
        "MegatronBertForTokenClassification": {"ner"},
        "MegatronBertForQuestionAnswering": {"question-answering"},
        "MegatronBertForMultipleChoice": {"multiple-choice"},
    }
    for architecture in HEADS:
        folder = tmp_path / architecture
        make_directory(folder, architecture, vocabulary_file("uncased"), lowercase=True)
        for task in TASKS:
            if task == "features" or task in can.get(architecture, ()):
                assert Predictor.open(folder, task).model.loading_info["missing_keys"] == []
                continue
            told = rf"{task} needs a MegatronBert\w+, and this is a {architecture}"
            with pytest.raises(ConfigError, match=told):
                Predictor.open(folder, task)
    with pytest.raises(ConfigError, match="can do fill-mask, next-sentence, features;"):
        Predictor.open(tmp_path / "MegatronBertForPreTraining", "ner")


def test_a_model_without_pooler_gives_features(tmp_path, vocabulary_file):
    from megatron_bert_tp import MegatronBertModel

    make_directory(tmp_path / "whole", "MegatronBertModel", vocabulary_file("cased"), lowercase=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "bare", ignore=shutil.ignore_patterns("model.*", "config.json"))
    whole = MegatronBertModel.from_pretrained(tmp_path / "whole", add_pooling_layer=False)
    whole.save_pretrained(tmp_path / "bare")
    assert predict(tmp_path / "bare", "features", TEXTS) == predict(tmp_path / "whole", "features", TEXTS)


@pytest.mark.parametrize("vocabulary", ["uncased", "cased"])
def test_a_checkpoint_answers_like_the_directory_it_comes_from(directory_of, tmp_path, vocabulary):
    directory = directory_of("MegatronBertForTokenClassification", vocabulary, **named(*ENTITIES))
    from_huggingface(directory, tmp_path / "checkpoint")
    assert predict(tmp_path / "checkpoint", "ner", TEXTS) == predict(directory, "ner", TEXTS)


def test_the_settings_of_an_old_tokenizer_count(directory_of, tmp_path):
    """A ``vocab.txt`` with a `tokenizer_config.json`, as directories before `tokenizer.json` are."""
    source = directory_of("MegatronBertForTokenClassification", **named(*ENTITIES))
    shutil.copytree(source, tmp_path / "old", ignore=shutil.ignore_patterns("*token*"))
    choices = {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}
    settings = json.dumps({**choices, "model_max_length": 9})
    (tmp_path / "old" / "tokenizer_config.json").write_text(settings)
    encoder = Predictor.open(tmp_path / "old", "ner").setup.encoder
    ids = {entry: number for number, entry in enumerate(VOCABULARIES["uncased"])}
    theirs = BertTokenizer(vocab=ids, **choices)
    for text in (TEXTS[1], TEXTS[2]):
        expected = theirs(text, truncation=True, max_length=9)["input_ids"]
        assert list(encoder.row(text).ids) == expected
    assert encoder.row(LONG).cut > len(encoder.row(LONG)) == 9


def test_a_directory_without_its_tokenizer_is_refused(directory_of, tmp_path):
    source = directory_of(MASKED)
    shutil.copytree(source, tmp_path / "none", ignore=shutil.ignore_patterns("*token*", "vocab.txt"))
    with pytest.raises(FormatError, match="has no tokenizer; put the vocab"):
        Predictor.open(tmp_path / "none", "fill-mask")
    shutil.copytree(tmp_path / "none", tmp_path / "other")
    entries = [*VOCABULARIES["uncased"], "w1", "w2", "w3", "w4"]
    (tmp_path / "other" / "vocab.txt").write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")
    size = len(entries)
    with pytest.raises(FormatError, match=f"the tokenizer has {size} entries, but the model has {size - 1} words"):
        Predictor.open(tmp_path / "other", "fill-mask")
    (tmp_path / "other" / "tokenizer_config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        Predictor.open(tmp_path / "other", "fill-mask")


def test_a_damaged_checkpoint_is_not_asked(directory_of, tmp_path):
    from megatron_bert_tp.errors import CheckpointError

    from_huggingface(directory_of(MASKED), tmp_path / "checkpoint")
    largest = max(Path(tmp_path).rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-3] ^= 1
    largest.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        Predictor.open(tmp_path / "checkpoint", "fill-mask")


def test_number_formats_are_those_of_the_files_or_as_wished(directory_of):
    directory = directory_of(MASKED)
    assert Predictor.open(directory, "fill-mask").model.dtype == torch.float32
    predictor = Predictor.open(directory, "fill-mask", dtype=torch.bfloat16)
    assert predictor.model.dtype == torch.bfloat16
    (record,) = answers(predictor, ["a [MASK]"])
    scores = [word["score"] for word in record["masks"][0]]
    assert scores == sorted(scores, reverse=True)
    assert any(score != torch.tensor(score).bfloat16().item() for score in scores), "softmax is in float32"


def test_both_tables_name_the_same_tasks():
    assert list(NAMES) == list(TASKS) == list(LINES)


def answers_of_rank(directories: dict[str, str]) -> dict[str, list[dict[str, object]]]:
    """Records of every task on the first of two ranks that share the model; nothing on the other."""
    from tests.support import Layout, build_mesh

    mesh, found = build_mesh(Layout(tensor=2)), {}
    for task, directory in directories.items():
        predictor = Predictor.open(Path(directory), task, mesh=mesh, dtype=torch.float64, batch_size=3)
        if not mesh.tensor.is_first:
            predictor.follow()
            continue
        found[task] = answers(predictor, LINES[task][1], window=4)
        predictor.finish()
    return found


def test_two_tensor_ranks_give_the_answers_of_one_process(directory_of, ranks):
    settings = {"ner": named(*ENTITIES)}
    directories = {task: str(directory_of(LINES[task][0], **settings.get(task, {}))) for task in LINES}
    first, second = ranks.run(2, answers_of_rank, directories)
    assert second == {}
    for task, (_, lines) in LINES.items():
        alone = answers(Predictor.open(Path(directories[task]), task, dtype=torch.float64), lines)
        assert without_numbers(first[task]) == without_numbers(alone)
        assert numbers_of(first[task]) == pytest.approx(numbers_of(alone), abs=1e-11)
