"""Directories that cannot be read as a MegatronBert are refused with all reasons, before a weight is read."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from tests.formats.conftest import build

EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder"


@pytest.fixture
def directory(saved) -> Path:
    return saved()


def set_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def set_tensors(directory: Path, remove: tuple[str, ...] = (), **values: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if name not in remove}
    save_file({**tensors, **values}, path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu_fast"}, "hidden_act: 'gelu_fast' is not one of gelu, gelu_new, relu, silu"),
        ({"hidden_act": ["gelu"]}, r"hidden_act: \['gelu'\] is not one of"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type: 'rotary' is not one of absolute, rel"),
        ({"is_decoder": "yes"}, "is_decoder: 'yes' is not true or false"),
        ({"add_cross_attention": True}, "add_cross_attention needs is_decoder"),
        (
            {"architectures": ["BertForPreTraining"]},
            "architectures names the class 'BertForPreTraining'; write one",
        ),
        ({"id2label": {}, "num_labels": 0}, "num_labels: 0 is not a whole number"),
        ({"model_type": "bert"}, "model_type is 'bert'; only 'megatron-bert'"),
        ({"vocab_size": "many"}, "vocab_size: 'many' is not a whole number"),
        ({"pad_token_id": None}, "pad_token_id is null, but it must be a number"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: 1000000000000 is not"),
        ({"num_attention_heads": 5}, r"hidden_size \(16\) must be a multiple of num_attention_heads \(5\)"),
    ],
)
def test_settings_that_are_not_supported_are_refused(directory, values, message):
    set_config(directory, **values)
    with pytest.raises(FormatError, match=message):
        HuggingFaceDirectory.open(directory)


def test_all_settings_that_are_not_supported_are_listed_at_once(directory):
    set_config(directory, hidden_act="tanh", is_decoder=3)
    with pytest.raises(FormatError, match=r"hidden_act(?s:.*)is_decoder"):
        HuggingFaceDirectory.open(directory)


def test_absolute_positions_may_be_said_and_numbers_left_to_their_defaults(tmp_path):
    build(type_vocab_size=2, pad_token_id=0).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for name in ("type_vocab_size", "pad_token_id", "tie_word_embeddings", "is_decoder", "hidden_act"):
        del values[name]
    path.write_text(json.dumps({**values, "position_embedding_type": "absolute"}))
    assert HuggingFaceDirectory.open(tmp_path).shape.type_vocab_size == 2


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(directory):
    wrong = {"cls.predictions.bias": torch.zeros(7), "bert.extra": torch.zeros(1)}
    set_tensors(directory, remove=("bert.pooler.dense.bias",), **wrong)
    with pytest.raises(FormatError) as raised:
        HuggingFaceDirectory.open(directory)
    assert "missing: bert.pooler.dense.bias" in str(raised.value)
    assert "unexpected: bert.extra" in str(raised.value)
    assert "cls.predictions.bias has the shape (7,), but config.json says (1003,)" in str(raised.value)


def test_whole_numbers_are_no_weights(directory):
    set_tensors(directory, **{"bert.pooler.dense.bias": torch.zeros(16, dtype=torch.int8)})
    with pytest.raises(FormatError, match="number format I8"):
        HuggingFaceDirectory.open(directory)


def test_old_position_ids_are_ignored(directory):
    set_tensors(directory, **{"bert.embeddings.position_ids": torch.arange(20)[None]})
    HuggingFaceDirectory.open(directory)


def test_a_tied_copy_that_is_equal_is_accepted(directory):
    tensors = load_file(directory / "model.safetensors")
    copies = {f"{DECODER}.weight": tensors[EMBEDDINGS].clone(), f"{DECODER}.bias": tensors["cls.predictions.bias"]}
    set_tensors(directory, **{name: value.clone() for name, value in copies.items()})
    HuggingFaceDirectory.open(directory)


@pytest.mark.parametrize(("copy", "original"), [("weight", EMBEDDINGS), ("bias", "cls.predictions.bias")])
def test_a_tied_copy_that_differs_is_refused(directory, copy, original):
    other = load_file(directory / "model.safetensors")[original].clone()
    other[-1] += 1
    set_tensors(directory, **{f"{DECODER}.{copy}": other})
    with pytest.raises(FormatError, match=rf"decoder\.{copy} differs from {original}"):
        HuggingFaceDirectory.open(directory)


def test_an_untied_directory_needs_its_decoder(saved):
    directory = saved(tied=False)
    set_tensors(directory, remove=(f"{DECODER}.weight",))
    with pytest.raises(FormatError, match=r"missing: cls\.predictions\.decoder\.weight"):
        HuggingFaceDirectory.open(directory)


@pytest.mark.parametrize("left_out", ["cls.predictions.bias", f"{DECODER}.bias"])
def test_one_of_the_two_names_of_an_untied_bias_is_enough(saved, left_out):
    directory = saved(tied=False)
    set_tensors(directory, remove=(left_out,))
    expected = build(tied=False).cls.predictions.bias
    assert torch.equal(HuggingFaceDirectory.open(directory).read("cls.predictions.bias", (0,), (1003,)), expected)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FormatError, match="nowhere: no such directory"):
        HuggingFaceDirectory.open(tmp_path / "nowhere")


def test_a_directory_without_settings_or_weights_says_which(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        HuggingFaceDirectory.open(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json: no such file"):
        HuggingFaceDirectory.open(directory)


@pytest.mark.parametrize("kept", [0, 5, 500, -3])
def test_truncated_weights_are_refused(directory, kept):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FormatError, match=r"model\.safetensors: cannot be read"):
        HuggingFaceDirectory.open(directory)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "must hold a JSON object"), (" " * 2**21, "credible")]
)
def test_damaged_settings_are_refused(directory, text, message):
    (directory / "config.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        HuggingFaceDirectory.open(directory)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "a\\b", 3, None])
def test_an_index_that_leads_out_of_the_directory_is_refused(saved, name):
    directory = saved(shards=True)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][EMBEDDINGS] = name
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match="is not the plain name of a file"):
        HuggingFaceDirectory.open(directory)


def test_a_missing_shard_is_named(saved):
    directory = saved(shards=True)
    shard = sorted(directory.glob("model-*.safetensors"))[2]
    os.remove(shard)
    with pytest.raises(FormatError, match=rf"{shard.name}: cannot be read.*missing"):
        HuggingFaceDirectory.open(directory)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_files_is_refused(saved, index):
    directory = saved(shards=True)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="weight_map must say"):
        HuggingFaceDirectory.open(directory)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b"], "id2label must be an object of names by number, not a list"),
        ({"0": "a", "2": "b"}, "id2label has the key '2'; its 2 keys must be the whole numbers 0 to 1"),
        ({"0": "a", "x": "b"}, "id2label has the key 'x'"),
        ({"0": "a", "1": 3}, "id2label names 1 3; the name of a class must be text"),
    ],
)
def test_names_of_classes_that_are_none_are_refused(directory, labels, message):
    set_config(directory, id2label=labels)
    with pytest.raises(FormatError, match=message):
        HuggingFaceDirectory.open(directory)


def test_numbers_without_end_are_refused(directory):
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"layer_norm_eps": 1e-07', '"layer_norm_eps": 1e999'))
    with pytest.raises(FormatError, match="1e999 is larger than any number can be"):
        HuggingFaceDirectory.open(directory)


@pytest.mark.parametrize(("name", "value"), [("layer_norm_eps", 10**400), ("num_labels", 100_001)])
def test_numbers_that_are_not_credible_are_refused(directory, name, value):
    set_config(directory, **{name: value})
    with pytest.raises(FormatError, match=f"{name}: {value} is not"):
        HuggingFaceDirectory.open(directory)


def reindex(directory: Path, name: str, file: str | None) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {name: file}
    if file is None:
        del index["weight_map"][name]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("bert.extra", "model-00001-of-{}", "'bert.extra' is in model-00001.*but it is in none of the files"),
        ("bert.encoder.ln.bias", None, "'bert.encoder.ln.bias' is in no file, but it is in model-"),
        (
            "cls.predictions.bias",
            "model-00001-of-{}",
            "'cls.predictions.bias' is in model-00001.*but it is in model-",
        ),
        (EMBEDDINGS, "model.bin", "names 'model.bin', but may only name files that end in .safetensors"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(saved, name, file, message):
    directory = saved(shards=True)
    shards = sorted(directory.glob("model-*.safetensors"))
    reindex(directory, name, file and file.format(shards[0].name.rpartition("-")[2]))
    with pytest.raises(FormatError, match=message):
        HuggingFaceDirectory.open(directory)


def test_a_pipe_in_place_of_a_shard_is_refused(saved):
    directory = saved(shards=True)
    shard = sorted(directory.glob("model-*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(FormatError, match=f"{shard.name}: is a pipe or a device"):
        HuggingFaceDirectory.open(directory)
