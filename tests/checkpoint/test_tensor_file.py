"""Tensor files that are written piece by piece are those that the safetensors library writes."""

import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bert_tp.checkpoint import open_files, tensor_file
from megatron_bert_tp.checkpoint.open_files import OpenFiles
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.checkpoint.save import save_whole
from megatron_bert_tp.checkpoint.tensor_file import KINDS, Content, read_in_blocks, write_tensor_file

MIXED = {
    "b/one": torch.randn(3, 5),
    "a": torch.arange(4),
    "half": torch.randn(7).half(),
    "brain": torch.randn(3).bfloat16(),
    '\u00e4 "quoted"': torch.randn(2, 2, 2).double(),
    "scalar": torch.tensor(3.5),
    "across": torch.randn(4, 6).T,
    "none": torch.zeros(0, 3),
}


def content(name: str, tensor: torch.Tensor) -> Content:
    return Content(name, tuple(tensor.shape), tensor.dtype, lambda: (tensor,))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("names", [list(MIXED), ["half"], []])
def test_the_bytes_are_those_of_the_library(tmp_path, metadata, names):
    held = {name: MIXED[name].contiguous() for name in names}
    save_file(held, tmp_path / "theirs", metadata=metadata)
    write_tensor_file(tmp_path / "ours", [content(*item) for item in held.items()], metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_every_format_is_that_of_the_library(tmp_path):
    """In the library's order: the header lists tensors as they lie in the file."""
    held = {str(dtype): torch.ones(1, dtype=dtype) for dtype in KINDS}
    save_file(held, tmp_path / "file")
    header = (tmp_path / "file").read_bytes()[8:].decode(errors="replace")
    places = [header.index(f'"{dtype}":{{"dtype":"{kind}"') for dtype, kind in KINDS.items()]
    assert places == sorted(places, reverse=True)


def test_a_tensor_that_is_no_rectangle_of_memory_is_written_in_its_order(tmp_path):
    write_tensor_file(tmp_path / "file", [content("across", MIXED["across"])])
    assert torch.equal(load_file(tmp_path / "file")["across"], MIXED["across"])


def test_one_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """And a large tensor is cut into blocks of rows; one row may be larger than a block."""
    monkeypatch.setattr(tensor_file, "_BLOCK", 1000)
    whole = {"wide": torch.randn(6, 300), "tall": torch.randn(300, 6), "small": torch.randn(9)}
    alive, extents, told = [], [], []

    def read(name, offsets, extent):
        assert not any(reference() is not None for reference in alive)
        window = tuple(slice(o, o + e) for o, e in zip(offsets, extent, strict=True))
        piece = whole[name][window].clone()
        alive.append(weakref.ref(piece))
        extents.append((name, extent))
        return piece

    contents = [
        Content(name, tuple(value.shape), value.dtype, lambda name=name, value=value: blocks(name, value.shape))
        for name, value in whole.items()
    ]

    def blocks(name, shape):
        return read_in_blocks(read, name, tuple(shape))

    write_tensor_file(tmp_path / "file", contents, advance=told.append)
    assert {name: value.tolist() for name, value in load_file(tmp_path / "file").items()} == {
        name: value.tolist() for name, value in whole.items()
    }
    assert extents.count(("wide", (1, 300))) == 6
    assert extents.count(("tall", (20, 6))) == 15
    assert sum(told) == sum(value.nbytes for value in whole.values())


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2).double(), torch.zeros(0)])
def test_a_block_of_another_size_or_format_is_a_bug_that_is_seen(tmp_path, wrong):
    with pytest.raises(AssertionError, match="a: "):
        write_tensor_file(tmp_path / "file", [Content("a", (2,), torch.float32, lambda: (wrong,))])


def test_a_checkpoint_of_whole_tensors_reads_as_any_other(tmp_path):
    told = []
    held = {f"weight/{name}": tensor for name, tensor in MIXED.items() if tensor.numel()}
    save_whole(
        tmp_path,
        3,
        [content(*item) for item in held.items()],
        facts={"a": 1},
        attachments={},
        advance=told.append,
    )
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.verify()
    assert (checkpoint.step, checkpoint.facts) == (3, {"a": 1})
    assert sum(told) == sum(tensor.nbytes for tensor in held.values())
    for name, tensor in held.items():
        read = checkpoint.read(name, (0,) * tensor.dim(), tuple(tensor.shape))
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_open_files_are_closed_when_much_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(open_files, "_MOST", 100)
    opened = []
    files = OpenFiles(lambda path: opened.append(path) or path)
    for _ in range(3):
        files.get(tmp_path / "a")
        files.count(60)
    assert len(opened) == 2
