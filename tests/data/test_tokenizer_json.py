"""A tokenizer.json of strangers is a program: what could take forever or fill all memory is not run."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bert_tp.data.tokenizer import SPECIAL_TOKENS, Tokenizer, bert_tokenizer
from megatron_bert_tp.errors import DataError

IDS = {entry: number for number, entry in enumerate([*SPECIAL_TOKENS, "a", "##a", "aa"])}


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """A tokenizer.json with some of its parts changed."""

    def _write(**parts: object) -> Path:
        settings = json.loads(bert_tokenizer(IDS, lowercase=True).to_str())
        settings["model"] |= parts.pop("model", {})
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({**settings, **parts}))
        return path

    return _write


def replacing(pattern: dict[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(name: str, steps: list[object]) -> dict[str, object]:
    return {"type": "Sequence", name: steps}


DOUBLING = replacing({"String": "a"}, "aa")
BACKTRACKING = {"Regex": "(a|a|a)*$^"}
SPLIT = {"type": "Split", "pattern": BACKTRACKING, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"normalizer": replacing(BACKTRACKING, "")}, "its normalizer holds 'Replace'"),
        ({"normalizer": sequence("normalizers", [DOUBLING] * 40)}, "its normalizer holds 'Replace'"),
        ({"normalizer": sequence("normalizers", [sequence("normalizers", [DOUBLING])])}, "holds 'Replace'"),
        ({"normalizer": sequence("normalizers", [{"type": "NFC"}] * 21)}, "its normalizer holds 21 steps"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}}, "its normalizer holds 'Prepend'"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "holds 'Precompiled'"),
        ({"normalizer": ["NFC"]}, "holds 'something else'"),
        ({"pre_tokenizer": SPLIT}, "its pre_tokenizer holds 'Split'"),
        ({"pre_tokenizer": sequence("pretokenizers", [{"type": "Whitespace"}, SPLIT])}, "holds 'Split'"),
        ({"decoder": replacing(BACKTRACKING, "")}, "its decoder holds 'Replace'"),
        ({"model": {"vocab": {**IDS, "b": 4_000_000_000}}}, "the id 4000000000 is not credible"),
        ({"added_tokens": [{"id": 2**31, "content": "b"}]}, "the id 2147483648 is not credible"),
        ({"model": {"max_input_chars_per_word": 10**9}}, "max_input_chars_per_word is 1000000000"),
        ({"model": {"type": "Unigram"}}, "tokenizer.json"),
        ({"model": {"vocab": []}}, "not a tokenizer.json"),
    ],
)
def test_what_is_not_needed_is_refused_at_once(write, parts, told):
    started = time.process_time()
    with pytest.raises(DataError, match=told.replace("(", r"\(")):
        Tokenizer.load(write(**parts), lowercase=True)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "7", '{"model": 7}', '{"model": {}}', "{"])
def test_other_json_is_one_message(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json", lowercase=True)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"normalizer": None, "decoder": None},
        {
            "normalizer": sequence(
                "normalizers", [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}]
            )
        },
        {"pre_tokenizer": sequence("pretokenizers", [{"type": "WhitespaceSplit"}])},
    ],
)
def test_the_steps_of_bert_tokenizers_are_run(write, parts):
    assert Tokenizer.load(write(**parts), lowercase=True).encode_batch(["a aa"]) == [[IDS["a"], IDS["aa"]]]
