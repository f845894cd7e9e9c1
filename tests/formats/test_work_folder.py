"""Writers work in a folder of their own: nothing that a user has beside OUT is removed, followed or read over."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.convert import from_huggingface, to_huggingface
from megatron_bert_tp.formats.megatron.convert import to_megatron
from megatron_bert_tp.formats.weights import ModelSource
from megatron_bert_tp.formats.work_folder import work_folder


def to_ngc(source: Path, out: Path) -> None:
    model = ModelSource.open(source)
    to_megatron(model.shape, model.head, model.read, out, tensor=1, pipeline=1, lowercase=None)


WRITERS = {"to-hf": to_huggingface, "to-ngc": to_ngc}


@pytest.fixture(params=WRITERS)
def writer(request) -> Callable[[Path, Path], object]:
    return WRITERS[request.param]


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    from_huggingface(saved(type_vocab_size=2), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_folder_of_the_user_called_partial_is_untouched(checkpoint, tmp_path, writer):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis").write_text("mine")
    writer(checkpoint, tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis").read_text() == "mine"
    assert not list(tmp_path.glob(".out.*"))


def test_a_source_called_partial_is_untouched(checkpoint, tmp_path, writer):
    source = checkpoint.rename(tmp_path / "out.partial")
    files = sorted(source.rglob("*"))
    writer(source, tmp_path / "out")
    assert sorted(source.rglob("*")) == files
    assert (tmp_path / "out").is_dir()


def test_a_link_called_partial_is_neither_followed_nor_removed(checkpoint, tmp_path, writer):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis").write_text("mine")
    (tmp_path / "out.partial").symlink_to(tmp_path / "kept")
    writer(checkpoint, tmp_path / "out")
    assert (tmp_path / "out.partial").is_symlink()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["thesis"]


@pytest.mark.parametrize("exists", [True, False])
def test_an_out_that_is_a_link_is_refused(checkpoint, tmp_path, writer, exists):
    if exists:
        (tmp_path / "kept").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "kept")
    with pytest.raises(FormatError, match="out: is a symbolic link"):
        writer(checkpoint, tmp_path / "out")


def test_a_failure_removes_the_work_and_nothing_else(tmp_path):
    (tmp_path / "beside").mkdir()
    with pytest.raises(FileNotFoundError), work_folder(tmp_path / "new" / "out") as folder:
        (folder / "file").rename(folder / "nowhere" / "file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["beside", "new"]
