"""`pytorch_model.bin`: tensors are read, and nothing else in it is ever made or run."""

import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.convert import from_huggingface, to_huggingface
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from megatron_bert_tp.formats.megatron.pickle_globals import stand_ins
from megatron_bert_tp.formats.pickled import load_pickled
from tests.formats.conftest import assert_same_bytes, save_pickled

BINARY = "pytorch_model.bin"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"legacy": True}, {"shards": 3}], ids=["zip", "before torch 1.6", "shards"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_forms_give_the_bytes_of_safetensors(saved, tmp_path, tied, options, dtype):
    original = saved("original", tied=tied, dtype=dtype)
    pickled = saved("pickled", tied=tied, dtype=dtype)
    save_pickled(pickled, **options)
    from_huggingface(pickled, tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bytes(original, tmp_path / "out")


class Writes:
    """Opens a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return open, (str(self._path), "w")


class RunsCommand(Writes):
    def __reduce__(self):
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("attack", [Writes, RunsCommand])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(saved, tmp_path, attack, legacy):
    directory = saved()
    (directory / "model.safetensors").unlink()
    content = {"bert.encoder.ln.weight": torch.zeros(16), "cls.predictions.bias": attack(tmp_path / "made")}
    torch.save(content, directory / BINARY, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        FormatError, match=rf"{BINARY}: cannot be read: .*holds more than tensors.*never unpickled"
    ):
        HuggingFaceDirectory.open(directory)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 3])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / BINARY)
    with pytest.raises(FormatError, match="must hold tensors under their names, not a"):
        load_pickled(tmp_path / BINARY)


@pytest.mark.parametrize(
    "content", [{"model": {"a": torch.zeros(2)}}, {3: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}, {"a": 1}]
)
def test_anything_but_plain_tensors_under_names_is_refused(tmp_path, content):
    torch.save(content, tmp_path / BINARY)
    with pytest.raises(FormatError, match=r"only a state dict can be read|cannot be read"):
        load_pickled(tmp_path / BINARY)


@pytest.mark.parametrize("kept", [0, 5, 500, -3])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_refused(saved, kept, legacy):
    directory = saved()
    save_pickled(directory, legacy=legacy)
    path = directory / BINARY
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FormatError, match=rf"{BINARY}: cannot be read"):
        HuggingFaceDirectory.open(directory)


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    plain = io.BytesIO()
    torch.save({"a": torch.zeros(10_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / BINARY, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    with pytest.raises(FormatError, match="has compressed members"):
        load_pickled(tmp_path / BINARY)


def test_a_missing_shard_is_named(saved):
    directory = saved()
    save_pickled(directory, shards=3)
    os.remove(directory / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(FormatError, match=r"pytorch_model-00002-of-00003\.bin: cannot be read .*missing"):
        HuggingFaceDirectory.open(directory)


def test_an_index_that_leads_out_of_the_directory_is_refused(saved):
    directory = saved()
    save_pickled(directory, shards=3)
    path = directory / f"{BINARY}.index.json"
    path.write_text(json.dumps({"weight_map": {"bert.encoder.ln.weight": "../other.bin"}}))
    with pytest.raises(FormatError, match="is not the plain name of a file"):
        HuggingFaceDirectory.open(directory)


def test_a_tied_copy_that_differs_is_refused(saved):
    directory = saved()
    model_bias = torch.zeros(1003)
    save_pickled(directory, **{"cls.predictions.decoder.bias": model_bias})
    with pytest.raises(FormatError, match=r"decoder\.bias differs from cls\.predictions\.bias"):
        HuggingFaceDirectory.open(directory)


def test_safetensors_come_before_a_pickle(saved):
    directory = saved()
    (directory / BINARY).write_bytes(b"never looked at")
    HuggingFaceDirectory.open(directory)


class Calls:
    """Pickles as a call of ``function``, and then gets a state."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


@pytest.mark.parametrize("legacy", [False, True])
def test_a_small_pickle_that_wants_all_memory_is_refused_by_name(tmp_path, legacy):
    content = {"a": torch.zeros(2), "b": Calls(bytearray, 8 * 10**9)}
    torch.save(content, tmp_path / BINARY, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FormatError, match=r"cannot be read: .*more than tensors.*asks for builtins\.bytearray"):
        load_pickled(tmp_path / BINARY)


def test_a_tensor_with_a_state_of_its_own_is_refused(tmp_path):
    value = torch.zeros(2)
    value.detach = 3
    torch.save({"a": value}, tmp_path / BINARY)
    with pytest.raises(FormatError, match="_rebuild_from_type_v2"):
        load_pickled(tmp_path / BINARY)


@pytest.mark.parametrize("size", [1000, 10**9])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_number_that_stands_for_many_is_refused(tmp_path, size, legacy):
    content = {"a": torch.zeros(1).expand(size)}
    torch.save(content, tmp_path / BINARY, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FormatError, match=f"repeats one number {size} times|speaks of {size} numbers"):
        load_pickled(tmp_path / BINARY)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_that_overlap_beyond_the_file_are_refused_and_tied_ones_are_not(tmp_path, legacy):
    value = torch.arange(10_000.0)
    form = {"_use_new_zipfile_serialization": not legacy}
    torch.save({"a": value, "b": value, "c": torch.nn.Parameter(value)}, tmp_path / BINARY, **form)
    assert torch.equal(load_pickled(tmp_path / BINARY)["b"], value)
    torch.save({str(first): value[first : first + 9000] for first in range(8)}, tmp_path / BINARY, **form)
    with pytest.raises(FormatError, match="they overlap"):
        load_pickled(tmp_path / BINARY)


def test_a_zip_with_two_lists_of_members_is_refused(tmp_path):
    for name, number in (("one", 1.0), ("other", 2.0)):
        torch.save({"a": torch.full((3,), number)}, tmp_path / name)
    path = tmp_path / BINARY
    path.write_bytes(b"".join((tmp_path / name).read_bytes() for name in ("one", "other")))
    with zipfile.ZipFile(path) as archive:  # Python reads the second, ...
        record = next(name for name in archive.namelist() if name.endswith("data/0"))
        assert archive.read(record) == torch.full((3,), 2.0).numpy().tobytes()
    assert torch.load(path, weights_only=True)["a"][0] == 1.0  # ... torch the first
    with pytest.raises(FormatError, match="its list of members is not where its last bytes say"):
        load_pickled(path)
    with pytest.raises(FormatError, match="its list of members is not where its last bytes say"):
        stand_ins(path)
