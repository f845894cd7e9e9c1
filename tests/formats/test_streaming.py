"""Conversions hold one block of one tensor at a time, whatever the size of the model."""

import shutil
import weakref

import pytest
import torch

from megatron_bert_tp.checkpoint import tensor_file
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats import convert
from megatron_bert_tp.formats.convert import from_huggingface, to_huggingface
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from megatron_bert_tp.formats.huggingface_writer import write_directory
from megatron_bert_tp.model.shape import tensor_shapes
from tests.checkpoint.layouts import ODD, save, whole
from tests.formats.conftest import assert_same_bytes


class Watched:
    """A source that fails when anything that it gave before is still in memory."""

    def __init__(self, read) -> None:
        self._read, self._given, self.num_reads = read, [], 0

    def __call__(self, name, offsets, extent):
        assert not [reference for reference in self._given if reference() is not None], name
        piece = self._read(name, offsets, extent).clone()
        self._given.append(weakref.ref(piece))
        self.num_reads += 1
        return piece


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_an_export_holds_one_block_at_a_time(saved, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(tensor_file, "_BLOCK", 4096)
    original = saved()
    source = HuggingFaceDirectory.open(original)
    read = Watched(source.read)
    told = []
    write_directory(
        tmp_path / "out", source.shape, read, {}, dtype=dtype, progress=lambda *numbers: told.append(numbers)
    )
    num_tensors = len(tensor_shapes(source.shape))
    # Word embeddings of 1003 x 16 numbers are 32 blocks, the bias of the words is 2; a look at the formats before.
    assert read.num_reads == num_tensors + 31 + 1 + (num_tensors if dtype is None else 0)
    if dtype is not torch.bfloat16:
        assert_same_bytes(original, tmp_path / "out")
    size = 2 if dtype is torch.bfloat16 else 4
    total = size * sum(torch.Size(shape).numel() for shape in tensor_shapes(source.shape).values())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_an_import_holds_one_block_at_a_time(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_BLOCK", 4096)
    original = saved()
    watched = []

    def watching(read, dtype):
        assert dtype is None
        watched.append(Watched(read))
        return watched[-1]

    monkeypatch.setattr(convert, "converting", watching)
    from_huggingface(original, tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bytes(original, tmp_path / "out")
    assert watched[0].num_reads > len(tensor_shapes(HuggingFaceDirectory.open(original).shape))


def test_what_is_read_stays_right_when_files_are_opened_anew(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_bert_tp.checkpoint.open_files._MOST", 1000)
    original = saved(shards=True)
    from_huggingface(original, tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bytes(original, tmp_path / "out")


def test_a_full_disk_is_seen_before_a_weight_is_written(tmp_path, monkeypatch):
    save(tmp_path / "run", ODD)
    usage = shutil.disk_usage(tmp_path)._replace(free=1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(
        FormatError, match=r"out: cannot be written: the disk is too full; it needs .* 1\.2 kB are"
    ):
        to_huggingface(tmp_path / "run", tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_a_source_that_fails_in_the_middle_leaves_nothing_behind(saved, tmp_path):
    original = saved()
    source = HuggingFaceDirectory.open(original)

    def failing(name, offsets, extent):
        if "layer.3" in name:
            raise FormatError("lost")
        return source.read(name, offsets, extent)

    with pytest.raises(FormatError, match="lost"):
        write_directory(tmp_path / "out", source.shape, failing, {}, dtype=torch.float32)
    assert [each.name for each in tmp_path.iterdir()] == ["original"]


def test_an_import_over_the_size_of_files_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    original = saved()

    def full(*_arguments, **_options):
        raise OSError("the disk is too full")

    monkeypatch.setattr("megatron_bert_tp.checkpoint.save.write_tensor_file", full)
    with pytest.raises(Exception, match="cannot be written: the disk is too full"):
        from_huggingface(original, tmp_path / "checkpoint")
    assert [each.name for each in tmp_path.iterdir()] == ["original"]
    monkeypatch.undo()
    (tmp_path / "checkpoint").mkdir()
    from_huggingface(original, tmp_path / "checkpoint")
    assert whole(HuggingFaceDirectory.open(original).read, {"bert.encoder.ln.bias": (16,)})
