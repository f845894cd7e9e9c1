"""What a user gets wrong ends in one clear message: the rule, the value, the way out, and an exit code."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.errors import ExitCode
from tests.training.runs import make_data, pretrain


@pytest.fixture
def broken(tmp_path) -> Path:
    """A folder of data of its own, to break."""
    make_data(tmp_path)
    return tmp_path


def message(settings: Path, *overrides: object, code: ExitCode = ExitCode.BAD_DATA) -> str:
    """Error of a run that must fail fast, told without a traceback."""
    started = time.monotonic()
    done = pretrain(settings, *overrides)
    assert time.monotonic() - started < 30
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_missing_corpus_is_named_with_the_command_that_makes_it(broken):
    (broken / "corpus.idx").unlink()
    text = message(broken / "config.yaml")
    assert str(broken / "corpus.idx") in text
    assert "preprocess" in text


def test_an_empty_corpus_is_refused_as_empty(broken):
    (broken / "corpus.bin").write_bytes(b"")
    text = message(broken / "config.yaml")
    assert "an empty corpus" in text
    assert "0 bytes of tokens" in text
    assert "preprocess" in text


def test_a_corpus_without_two_sentences_in_a_document_is_refused_at_once(tmp_path):
    make_data(tmp_path, sentences=(1, 2))
    text = message(tmp_path / "config.yaml")
    # All 20 documents have one sentence, and 80% of them are for training.
    assert re.search(r"16 documents .* 0 ", text)
    assert "separate documents, not sentences, by blank lines" in text
    assert "objective.pairs=sop (one such document is enough) or none (single sentences are)" in text


def test_a_validation_part_of_too_few_documents_is_named_with_the_ways_out(broken):
    text = message(broken / "config.yaml", "data.split=[96,4,0]")
    assert "the validation part of data.split: " in text
    assert "of the 1 documents of this part 1 have so many" in text
    assert "or evaluate nothing, with run.evaluation_samples=0" in text


def test_another_tokenizer_than_the_one_of_the_corpus_is_refused(broken):
    text = message(broken / "config.yaml", f"data.tokenizer={short_vocabulary(broken)}")
    assert f"{broken}/corpus: made with the tokenizer" in text
    assert "data.tokenizer" in text


def short_vocabulary(folder: Path) -> Path:
    """The first 50 entries only: the corpus holds ids beyond."""
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()[:50]
    (folder / "short.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder / "short.txt"


@pytest.mark.parametrize("vocab_size", [50, 101], ids=["model too small", "model large enough"])
def test_ids_beyond_the_vocabulary_are_named_with_sentence_and_id(broken, vocab_size):
    # The facts beside the corpus would notice another tokenizer first.
    (broken / "corpus.json").unlink()
    tokenizer = short_vocabulary(broken)
    text = message(broken / "config.yaml", f"model.vocab_size={vocab_size}", f"data.tokenizer={tokenizer}")
    corpus = Corpus.open(broken / "corpus")
    sentence = next(n for n in range(corpus.num_sentences) if corpus.sentence(n).max() >= 50)
    first_id = next(token for token in corpus.sentence(sentence).tolist() if token >= 50)
    assert f"must lie in 0..49, but sentence {sentence} holds {first_id}" in text


def test_another_padding_token_than_the_one_of_the_vocabulary_is_refused(broken):
    assert "set model.pad_token_id=0" in message(broken / "config.yaml", "model.pad_token_id=7")


def test_a_vocabulary_larger_than_the_model_is_refused(broken):
    text = message(broken / "config.yaml", "model.vocab_size=60")
    assert "model.vocab_size=99" in text


def test_a_vocabulary_without_mask_is_refused(broken):
    lines = (broken / "vocab.txt").read_text().replace("[MASK]", "mask")
    (broken / "vocab.txt").write_text(lines)
    text = message(broken / "config.yaml")
    assert "[MASK]" in text
    assert "vocab.txt" in text


def test_a_checkpoint_of_another_model_size_is_refused_with_the_numbers(data, finished_run):
    given = (f"run.directory={finished_run}", "model.hidden_size=64", "run.resume=auto")
    text = message(data, *given, code=ExitCode.BAD_SETTINGS)
    assert "hidden_size" in text
    assert "32" in text
    assert "64" in text


def test_a_damaged_checkpoint_is_refused_by_name(data, finished_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy)
    victim = next((copy / "checkpoints" / "step_00000020").glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    text = message(data, f"run.resume={copy}", f"run.directory={tmp_path}/new", code=ExitCode.BAD_CHECKPOINT)
    assert victim.name in text


def test_a_missing_checkpoint_is_named(data, tmp_path):
    given = (f"run.directory={tmp_path}/run", f"run.resume={tmp_path}/nothing")
    text = message(data, *given, code=ExitCode.BAD_CHECKPOINT)
    assert str(tmp_path / "nothing") in text


def test_missing_weights_are_named(data, tmp_path):
    given = (f"run.directory={tmp_path}/run", f"model.weights={tmp_path}/nothing")
    text = message(data, *given, code=ExitCode.BAD_CHECKPOINT)
    assert str(tmp_path / "nothing") in text


def test_a_wrong_world_size_is_told_once_under_torchrun(data, tmp_path):
    done = pretrain(data, f"run.directory={tmp_path}/run", "parallel.tensor=4", processes=3)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "multiple" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_before_the_weights_move(data, tmp_path):
    done = pretrain(data, f"run.directory={tmp_path}/run", "optimizer.learning_rate=1e30", "optimizer.clip_norm=0")
    assert done.returncode == ExitCode.NOT_FINITE
    assert "must be finite" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["loss"] == row["loss"] for row in rows)
