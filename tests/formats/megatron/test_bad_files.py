"""Checkpoints that are damaged, foreign or at odds with themselves: one message each, and no rests."""

import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.inspect import describe
from megatron_bert_tp.formats.megatron.convert import from_megatron
from tests.formats.megatron import synthetic
from tests.formats.megatron.synthetic import Kind, write

FILE = "model_optim_rng.pt"
pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def make(models, tmp_path) -> Callable[..., Path]:
    """Function that writes a checkpoint and returns its directory."""

    def made(**kind: object) -> Path:
        return write(models[kind.get("binary", True)], Kind(**kind), tmp_path / "source")

    return made


def refused(source: Path, **wishes: object) -> str:
    """Message of the import, which leaves nothing behind."""
    out = source.parent / "out"
    with pytest.raises(FormatError) as raised:
        from_megatron(source, out, tell=lambda _: None, **wishes)
    assert not out.exists()
    assert not list(out.parent.glob(".out.*"))
    return str(raised.value)


def change(source: Path, alter: Callable[[dict], object], place: str = "mp_rank_00") -> Path:
    """The directory with one file changed in place."""
    path = source / "release" / place / FILE
    content = torch.load(path, weights_only=False)
    alter(content)
    torch.save(content, path)
    return source


def encoder(content: dict) -> dict:
    return content["model"]["language_model"]["encoder"]


# Files


@pytest.mark.parametrize(("one", "other"), [("000", "003"), ("000", "001"), ("002", "003")])
def test_swapped_stages_are_refused_by_name(make, one, other):
    release = make(pipeline=4) / "release"
    (release / f"mp_rank_00_{one}").rename(release / "third")
    (release / f"mp_rank_00_{other}").rename(release / f"mp_rank_00_{one}")
    (release / "third").rename(release / f"mp_rank_00_{other}")
    message = refused(release.parent)
    assert re.search(
        rf"mp_rank_00_({one}|{other})/{FILE}: holds .*, which belongs to the (first|last) stage", message
    )


def test_swapped_virtual_stages_are_refused(make):
    source = make(virtual=2)

    def swap(content: dict) -> None:
        content["model0"], content["model1"] = content["model1"], content["model0"]

    message = refused(change(source, swap))
    assert re.search(
        r"belongs to the (first|last) stage, but this is pipeline stage 0 of 1 \(model[01]\)", message
    )


@pytest.mark.parametrize("kept", [0, 1, 60, 5000, -1, -400])
@pytest.mark.parametrize("old", [True, False], ids=["before 1.6", "zip"])
def test_a_truncated_file_is_one_message(models, tmp_path, kept, old):
    path = tmp_path / FILE
    content = synthetic.content(models[True], Kind(), 0, 0)
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in refused(path)


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04hello", os.urandom(3000), b"\x80\x04K\x01."])
def test_a_foreign_file_is_one_message(tmp_path, content):
    path = tmp_path / FILE
    path.write_bytes(content)
    assert str(path) in refused(path)


def test_a_damaged_pickle_is_one_message(models, tmp_path):
    path = tmp_path / FILE
    torch.save(synthetic.content(models[True], Kind(), 0, 0), path, _use_new_zipfile_serialization=False)
    data = bytearray(path.read_bytes())
    data[400:500] = bytes(100)
    path.write_bytes(data)
    assert str(path) in refused(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must hold a dictionary, not a list"),
        ({"state": 1}, "must hold 'model'.*it holds: state"),
        ({}, "it holds: nothing"),
        ({"model1": {}}, "must hold 'model'"),
        ({"model": {}, "model0": {}}, "must hold 'model'"),
        ({"model": {}, "checkpoint_version": "3"}, "checkpoint_version is a str, not a number"),
        ({"model": {}}, "is no BERT of Megatron-LM: .*word_embeddings.weight.*not found"),
        ({"model": {"gpt": torch.ones(2)}}, r"not found\n  unexpected: gpt in "),
        ({"model": {"a": torch.ones(2, dtype=torch.int64)}}, "a is torch.int64.*no plain numbers"),
        ({"model": {"a": torch.ones(2, device="meta")}}, "no plain numbers"),
        ({"model": {"a": torch.ones(2).to_sparse()}}, "no plain numbers"),
        ({"model": {"a": torch.ones(1).expand(10**9)}}, "its tensors have 4.0 GB, but the file"),
        ({"model": {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}}, r"holds 0:a\.b twice"),
    ],
)
def test_a_file_that_holds_something_else_says_what(tmp_path, content, message):
    torch.save(content, tmp_path / FILE)
    assert re.search(message, refused(tmp_path / FILE))


def test_dictionaries_that_hold_themselves_are_refused(tmp_path):
    endless: dict = {}
    endless |= {str(number): endless for number in range(4)}
    torch.save({"model": endless}, tmp_path / FILE)
    assert "more than 200000 entries" in refused(tmp_path / FILE)


def test_packed_records_are_refused(models, tmp_path):
    torch.save(synthetic.content(models[True], Kind(), 0, 0), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / FILE, "w") as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member), zipfile.ZIP_DEFLATED)
    assert "its records are compressed" in refused(tmp_path / FILE)


# Directories


def test_a_place_without_a_checkpoint_says_so(tmp_path):
    assert "no such file or directory" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert f"has no mp_rank_XX/{FILE}" in refused(tmp_path / "empty")
    (tmp_path / "empty" / ".metadata").touch()
    assert "--ckpt-format torch" in refused(tmp_path / "empty")


def test_missing_ranks_are_named(make):
    source = make(tensor=2, pipeline=2)
    (source / "release" / "mp_rank_01_000" / FILE).unlink()
    told = refused(source)
    assert "the files of 1 of 2 x 2 ranks" in told
    assert "the first of tensor rank 1 and stage 0" in told


def test_one_file_of_several_ranks_is_not_enough(make):
    source = make(tensor=2)
    told = refused(source / "release" / "mp_rank_00" / FILE)
    assert "say 2 x 1 ranks (tensor x pipeline), but there are files of 1 x 1" in told


def test_two_files_of_one_rank_are_refused(make):
    source = make()
    (source / "release" / "mp_rank_00").rename(source / "release" / "mp_rank_00_000")
    (source / "release" / "mp_rank_00").mkdir()
    (source / "release" / "mp_rank_00" / FILE).touch()
    assert "are both of one rank" in refused(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12", "names iter_0000012, which is not there; there are: release"),
        ("", "must hold a whole number or the word release"),
        ("../../etc", "must hold a whole number or the word release"),
    ],
)
def test_a_tracker_that_leads_nowhere_is_refused(make, text, message):
    source = make()
    (source / "latest_checkpointed_iteration.txt").write_text(text)
    assert message in refused(source)


def test_several_checkpoints_without_a_tracker_are_refused(models, make):
    source = make()
    write(models[True], Kind(), source, iteration="iter_0000003")
    (source / "latest_checkpointed_iteration.txt").unlink()
    assert "give one of them: iter_0000003, release" in refused(source)


# Tensors


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(make):
    def alter(content):
        tensors = encoder(content)
        del tensors["layers.1.mlp.dense_4h_to_h.bias"]
        tensors["layers.0.mlp.extra.weight"] = torch.ones(1)
        tensors["layers.2.input_layernorm.bias"] = torch.ones(7)
        content["model"]["lm_head"]["bias"] = torch.ones(1000)

    told = refused(change(make(), alter))
    assert "missing: bert.encoder.layer.1.output.dense.bias" in told
    assert "unexpected: language_model.encoder.layers.0.mlp.extra.weight in " in told
    assert "layer.2.attention.ln.bias has the shape (7,) on tensor rank 0, but must have (16,)" in told
    assert "cls.predictions.bias has the shape (1000,) on tensor rank 0, but must have (1024,)" in told


def test_half_a_binary_head_is_refused(make):
    told = refused(change(make(), lambda content: content["model"].pop("binary_head")))
    assert "missing: cls.seq_relationship.weight" in told


def test_a_missing_layer_is_noticed(make):
    def alter(content):
        tensors = encoder(content)
        for name in [name for name in tensors if name.startswith("layers.1.")]:
            del tensors[name]

    assert "missing: bert.encoder.layer.1.attention.ln.bias" in refused(change(make(), alter))


def test_a_missing_last_layer_is_noticed_by_the_arguments(make):
    def alter(content):
        tensors = encoder(content)
        for name in [name for name in tensors if name.startswith("layers.3.")]:
            del tensors[name]

    assert "missing: bert.encoder.layer.3.attention.ln.bias" in refused(change(make(), alter))


def test_a_tensor_that_one_rank_lacks_is_named(make):
    told = refused(
        change(make(tensor=2), lambda content: encoder(content).pop("final_layernorm.weight"), "mp_rank_01")
    )
    assert "missing: bert.encoder.ln.weight on tensor rank 1" in told


@pytest.mark.parametrize("delta", [1e-3, float("nan")])
def test_replicated_tensors_must_be_equal(make, delta):
    def alter(content):
        encoder(content)["layers.2.self_attention.dense.bias"][3] += delta

    told = refused(change(make(tensor=2), alter, "mp_rank_01"))
    assert "bert.encoder.layer.2.attention.output.dense.bias differs on tensor ranks 0 and 1" in told


def test_ranks_must_have_the_same_number_format(make):
    def alter(content):
        tensors = encoder(content)
        tensors["layers.2.mlp.dense_h_to_4h.bias"] = tensors["layers.2.mlp.dense_h_to_4h.bias"].half()

    told = refused(change(make(tensor=2), alter, "mp_rank_01"))
    assert "bert.encoder.layer.2.intermediate.dense.bias has other number formats on other ranks: F16, F32" in told


@pytest.mark.parametrize("rank", [0, 1])
def test_the_copy_of_the_last_stage_must_be_equal(make, rank):
    def alter(content):
        content["model"]["word_embeddings_for_head"]["weight"][-1, -1] += 1

    told = refused(change(make(tensor=2, pipeline=2), alter, f"mp_rank_0{rank}_001"))
    assert "the last stage's copy differs from bert.embeddings.word_embeddings.weight" in told


def test_a_tensor_under_two_names_is_refused(make):
    def alter(content):
        tensors = encoder(content)
        tensors["layers.0.attention.dense.bias"] = tensors["layers.0.self_attention.dense.bias"]

    assert "is there a second time, under another name or stage" in refused(change(make(), alter))


# Arguments


def test_files_of_different_checkpoints_are_refused(make, models):
    source = make(tensor=2)
    other = replace(Kind(tensor=2), version=1.0)
    torch.save(synthetic.content(models[True], other, 1, 0), source / "release" / "mp_rank_01" / FILE)
    assert "not of one checkpoint" in refused(source)
    other = Kind(tensor=2, arguments={"layernorm_epsilon": 0.1})
    torch.save(synthetic.content(models[True], other, 1, 0), source / "release" / "mp_rank_01" / FILE)
    assert "in layernorm_epsilon; these files are not of one checkpoint" in refused(source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"swiglu": True}, "swiglu is True; only False"),
        ({"normalization": "RMSNorm"}, "normalization is 'RMSNorm'"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ({"position_embedding_type": "rope"}, "position_embedding_type is 'rope'"),
        ({"hidden_size": 32}, r"word_embeddings.weight has the shape \(1024, 16\)"),
        ({"num_layers": 10**12}, "num_layers|num_hidden_layers: 1000000000000 is not"),
        ({"num_attention_heads": 3}, "must be a multiple of num_attention_heads"),
        ({"num_attention_heads": "4"}, "num_attention_heads: '4' is not a whole number"),
        ({"kv_channels": 8}, "kv_channels is 8, but must be hidden_size / num_attention_heads = 4"),
        ({"layernorm_epsilon": "small"}, "layer_norm_eps: 'small' is not a number"),
        ({"logical_vocab_size": 1025}, "a vocabulary of 1025 is impossible; the file has 1024 rows"),
        ({"logical_vocab_size": True}, "a vocabulary of True is impossible"),
    ],
)
def test_arguments_of_another_model_are_refused(make, arguments, message):
    assert re.search(message, refused(make(arguments=arguments)))


@pytest.mark.parametrize("version", [4.0, 0.5, -1.0, 2.5])
def test_an_unknown_version_is_refused(make, version):
    assert f"checkpoint_version is {version}; 0.0, 1.0, 2.0, 3.0 can be read" in refused(make(version=version))


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"vocab_size": 1025}, "a vocabulary of 1025 is impossible"),
        ({"vocab_size": 0}, "a vocabulary of 0 is impossible"),
        ({"hidden_act": "swish"}, "hidden_act 'swish' is unknown; known are gelu"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0 is not"),
        ({"num_attention_heads": 1}, "1 attention heads cannot lie on 2 tensor ranks"),
        ({"tokenizer": Path("nowhere.txt")}, "nowhere.txt: no such file"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(make, wishes, message):
    assert message in refused(make(tensor=2), **wishes)


# Pipes, which would keep a reader waiting for ever


@pytest.mark.parametrize("name", ["latest_checkpointed_iteration.txt", f"release/mp_rank_00/{FILE}"])
def test_a_pipe_in_place_of_a_file_is_refused(make, name):
    source = make()
    (source / name).unlink()
    os.mkfifo(source / name)
    assert f"{source / name}: is a pipe or a device, not a file" in refused(source)
    with pytest.raises(FormatError, match="is a pipe or a device"):
        list(describe(source))
