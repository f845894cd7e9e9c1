"""Import and export against the real `transformers`: same bytes, same settings, no missing or unexpected key."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from transformers import MegatronBertForPreTraining

from megatron_bert_tp.checkpoint.load import load_parts_
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.errors import CheckpointError, FormatError
from megatron_bert_tp.formats.convert import from_huggingface, to_huggingface
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from megatron_bert_tp.formats.huggingface_writer import write_directory
from megatron_bert_tp.formats.weights import open_weights
from megatron_bert_tp.model.shape import tensor_shapes
from tests.checkpoint.layouts import held, save, stages, whole
from tests.formats.conftest import ODD, assert_same_bytes, build, tensors


def round_trip(directory, tmp_path):
    from_huggingface(directory, tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    return tmp_path / "exported"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_import_then_export_gives_back_the_same_bytes(saved, tmp_path, tied, dtype):
    original = saved(tied=tied, dtype=dtype)
    assert_same_bytes(original, round_trip(original, tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_a_sharded_directory_gives_the_same_bytes(saved, tmp_path, tied):
    original = saved(tied=tied, shards=True)
    assert len(list(original.glob("*.safetensors"))) > 3
    assert_same_bytes(original, round_trip(original, tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_the_export_has_the_settings_that_transformers_writes(saved, tmp_path, tied):
    original = saved(tied=tied)
    exported = round_trip(original, tmp_path)
    expected = json.loads((original / "config.json").read_text())
    del expected["transformers_version"]
    assert json.loads((exported / "config.json").read_text()) == expected


def test_the_export_is_marked_as_written_for_torch(saved, tmp_path):
    exported = round_trip(saved(), tmp_path)
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_a_checkpoint_of_any_layout_loads_in_transformers(tmp_path, tied, tensor, pipeline):
    shape = replace(ODD, tie_word_embeddings=tied)
    save(tmp_path / "run", shape, tensor=tensor, pipeline=pipeline)
    to_huggingface(tmp_path / "run", tmp_path / "out")
    model, info = MegatronBertForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    state = model.state_dict()
    stage = stages(shape)[0]
    for part in stage.parts():
        assert torch.equal(state[part.name], part.view(part.parameter)), part.name
    assert torch.equal(state["cls.predictions.decoder.bias"], state["cls.predictions.bias"])


@pytest.mark.parametrize("tied", [True, False])
def test_export_of_four_ranks_equals_export_of_one(tmp_path, tied):
    shape = replace(ODD, tie_word_embeddings=tied)
    for name, layout in {"four": {"tensor": 2, "pipeline": 2}, "one": {}}.items():
        save(tmp_path / name, shape, kinds=("weight", "exp_avg", "exp_avg_sq"), **layout)
        to_huggingface(tmp_path / name, tmp_path / f"{name}-out")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one-out" / file).read_bytes() == (tmp_path / "four-out" / file).read_bytes()


def test_the_live_bias_of_an_untied_decoder_is_the_one_that_counts(tmp_path):
    model = build(tied=False)
    with torch.no_grad():
        model.cls.predictions.bias.zero_()  # as transformers 5 leaves it in training
    model.save_pretrained(tmp_path / "original")
    read = HuggingFaceDirectory.open(tmp_path / "original").read
    assert torch.equal(read("cls.predictions.bias", (3,), (9,)), model.cls.predictions.decoder.bias[3:12])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2), (4, 1)])
def test_every_layout_starts_from_a_directory(saved, tied, shards, tensor, pipeline):
    shape = replace(ODD, tie_word_embeddings=tied)
    directory = saved(tied=tied, shards=shards)
    expected = build(tied=tied).state_dict()
    read = open_weights(directory, shape, verify=True)
    for stage in stages(shape, tensor=tensor, pipeline=pipeline):
        load_parts_(stage.parts(), read)
        for part in stage.parts():
            assert torch.equal(part.view(part.parameter), part.cut(expected[part.name])), part.name


def test_an_imported_checkpoint_gives_weights_to_a_run(saved, tmp_path):
    from_huggingface(saved(), tmp_path / "checkpoint")
    expected = tensors(tmp_path / "original")
    read = open_weights(tmp_path / "checkpoint", ODD, verify=True)
    for name, value in whole(read, tensor_shapes(ODD)).items():
        assert torch.equal(value, expected[name]), name
    assert Checkpoint.open(tmp_path / "checkpoint").step == 0
    assert Checkpoint.open(tmp_path / "checkpoint").shapes("exp_avg") == {}


def test_weights_of_another_model_are_refused(saved, tmp_path):
    other = replace(ODD, intermediate_size=48, layer_norm_eps=1e-12)
    with pytest.raises(FormatError, match=r"intermediate_size: 24 there, 48 in(?s:.*)layer_norm_eps: 1e-07 there"):
        open_weights(saved(), other, verify=True)
    from_huggingface(tmp_path / "original", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="intermediate_size: 24 there, 48 in"):
        open_weights(tmp_path / "checkpoint", other, verify=True)


def test_weights_at_a_path_without_any_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        open_weights(tmp_path, ODD, verify=True)


def test_weights_of_a_damaged_checkpoint_are_not_used(tmp_path):
    step = save(tmp_path, ODD)
    path = step / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not fit the SHA-256"):
        open_weights(tmp_path, ODD, verify=True)
    assert open_weights(tmp_path, ODD, verify=False)  # the first rank looks for all
    with pytest.raises(CheckpointError, match="does not fit the SHA-256"):
        to_huggingface(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_can_change_the_number_format(tmp_path):
    checkpoint = Checkpoint.open(save(tmp_path / "run", ODD))
    write_directory(tmp_path / "out", ODD, checkpoint.weight, {}, dtype=torch.bfloat16)
    model = MegatronBertForPreTraining.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    dense = held(stages(ODD)[0])
    expected = next(part.tensor for part in dense if part.name.endswith("pooler.dense.weight"))
    assert torch.equal(model.bert.pooler.dense.weight, expected.bfloat16())


def test_what_stands_at_the_place_of_the_export_is_never_overwritten(saved, tmp_path):
    original = saved()
    from_huggingface(original, tmp_path / "checkpoint")
    with pytest.raises(FormatError, match="original: exists already"):
        write_directory(original, ODD, Checkpoint.open(tmp_path / "checkpoint").weight, {})
    for convert, source in ((to_huggingface, tmp_path / "checkpoint"), (from_huggingface, original)):
        with pytest.raises(FormatError, match="original: exists already and is not empty"):
            convert(source, original)
        (tmp_path / "file").write_text("text")
        with pytest.raises(FormatError, match="file: exists already"):
            convert(source, tmp_path / "file")


def test_an_empty_directory_may_be_written_to_and_keeps_ordinary_permissions(saved, tmp_path):
    from_huggingface(saved(), tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    to_huggingface(tmp_path / "checkpoint", tmp_path / "out")
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    (tmp_path / "ordinary").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "ordinary", "original", "out"]


def test_the_model_of_a_directory_is_that_of_its_settings(saved):
    assert asdict(HuggingFaceDirectory.open(saved()).shape) == asdict(ODD)
