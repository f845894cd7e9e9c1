"""`AutoTokenizer` gives, for an exported directory, the ids that the model was trained on."""

from argparse import Namespace
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer

from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.convert import from_huggingface, to_huggingface
from megatron_bert_tp.formats.weights import ModelSource
from tests.checkpoint.layouts import ODD, save
from tests.formats.conftest import build
from tests.formats.test_convert_command import convert

SPECIAL = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
UNCASED = [*SPECIAL, "un", "##it", "##s", "hello", "world", ",", "!", "uber", "東", "a", "##b"]
CASED = [*SPECIAL, "Un", "##it", "##s", "Hello", "world", ",", "!", "Über", "東", "a", "##b"]
TEXT = "Hello, Units Über 東 ab world! nothing"


def vocabulary(directory: Path, entries: list[str]) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "vocab.txt"
    path.write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")
    return path


def exported(tmp_path: Path, attachments: dict[str, Path], **facts: object) -> Path:
    save(tmp_path / "run", ODD, attachments=attachments, facts=facts)
    to_huggingface(tmp_path / "run", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(("entries", "lowercase"), [(UNCASED, True), (CASED, False)])
@pytest.mark.parametrize("is_said", [True, False])
def test_a_vocabulary_gives_the_ids_of_the_training(tmp_path, entries, lowercase, is_said):
    path = vocabulary(tmp_path / "data", entries)
    facts = {"lowercase": lowercase} if is_said else {}
    out = exported(tmp_path, {"vocab.txt": path}, **facts)
    loaded = AutoTokenizer.from_pretrained(out)
    ids = Tokenizer.load(path, lowercase).encode_batch([TEXT])[0]
    assert tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).encode(TEXT).ids == [3, *ids, 4]
    assert len(set(ids)) > 8
    assert loaded(TEXT)["input_ids"] == [3, *ids, 4]
    assert loaded("a", "world")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert loaded("[MASK] a")["input_ids"] == [3, 5, entries.index("a"), 4]
    assert (loaded.pad_token_id, loaded.unk_token_id, loaded.mask_token_id) == (0, 2, 5)
    assert loaded.model_max_length == ODD.max_position_embeddings
    assert len(loaded) == len(entries)


def test_what_is_said_of_capital_letters_counts_more_than_the_entries(tmp_path):
    path = vocabulary(tmp_path / "data", UNCASED)
    loaded = AutoTokenizer.from_pretrained(exported(tmp_path, {"vocab.txt": path}, lowercase=False))
    assert loaded("Hello hello")["input_ids"] == [3, 2, UNCASED.index("hello"), 4]


@pytest.mark.parametrize(("entries", "lowercase"), [(UNCASED, True), (CASED, False)])
def test_a_tokenizer_json_that_only_cuts_text_is_completed(tmp_path, entries, lowercase):
    ids = {entry: number for number, entry in enumerate(entries)}
    library = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.save(str(tmp_path / "tokenizer.json"))
    out = exported(tmp_path, {"tokenizer.json": tmp_path / "tokenizer.json"})
    expected = Tokenizer.load(tmp_path / "tokenizer.json", lowercase=True).encode_batch([TEXT])[0]
    assert AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == [3, *expected, 4]
    assert tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).encode(TEXT).ids == [3, *expected, 4]
    assert (out / "vocab.txt").read_text(encoding="utf-8").splitlines() == entries


@pytest.mark.parametrize(("entries", "lowercase"), [(UNCASED, True), (CASED, False)])
def test_the_files_of_transformers_go_through_unchanged(tmp_path, entries, lowercase):
    original = tmp_path / "original"
    build().save_pretrained(original)
    ids = {entry: number for number, entry in enumerate(entries)}
    tokenizer = BertTokenizer(vocab=ids, do_lower_case=lowercase)
    tokenizer.save_pretrained(original)
    from_huggingface(original, tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_directory_says_whether_its_tokenizer_is_uncased(saved, lowercase):
    directory = saved()
    assert ModelSource.open(directory).lowercase is None
    ids = {entry: number for number, entry in enumerate(UNCASED)}
    BertTokenizer(vocab=ids, do_lower_case=lowercase).save_pretrained(directory)
    assert ModelSource.open(directory).lowercase is lowercase


def test_settings_without_a_vocabulary_are_no_tokenizer(tmp_path):
    (tmp_path / "settings").write_text("{}")
    with pytest.raises(FormatError, match=r"neither vocab\.txt nor tokenizer\.json"):
        exported(tmp_path, {"tokenizer_config.json": tmp_path / "settings"})


def test_without_any_file_the_export_says_that_it_has_no_tokenizer(tmp_path):
    save(tmp_path / "run", ODD)
    assert to_huggingface(tmp_path / "run", tmp_path / "out").endswith(", without a tokenizer")


@pytest.mark.parametrize(("entries", "kind"), [(UNCASED, "BertWordPieceLowerCase"), (CASED, "BertWordPieceCase")])
def test_to_ngc_judges_the_case_by_the_entries_where_nothing_says_it(saved, tmp_path, entries, kind):
    directory = saved(type_vocab_size=2)
    vocabulary(directory, entries)
    assert convert("to-ngc", directory, tmp_path / "ngc", "--tensor", "1", "--pipeline", "1") == 0
    (path,) = (tmp_path / "ngc").rglob("*.pt")
    with torch.serialization.safe_globals([Namespace]):
        assert torch.load(path, weights_only=True)["args"].tokenizer_type == kind
