"""`convert inspect` says what any file is; exit code 0 when it is whole, 4 with the problem when it is not."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bert_tp.formats.convert import from_huggingface
from megatron_bert_tp.model.shape import HEADS
from tests.checkpoint.layouts import ODD as SAVED
from tests.checkpoint.layouts import save
from tests.formats.conftest import save_pickled
from tests.formats.test_convert_command import convert


@pytest.fixture
def inspected(capsys):
    """Function that inspects a path, which must be whole, and returns what was told, by title."""

    def inspect(path: Path, *options: str) -> dict[str, str]:
        assert convert("inspect", path, *options) == 0
        return told(capsys.readouterr().out)

    return inspect


@pytest.fixture
def refused(capsys):
    """Function that inspects a path that is not whole, and returns what was told before, and the problem."""

    def inspect(path: Path) -> tuple[dict[str, str], str]:
        assert convert("inspect", path) == 4
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return told(captured.out), captured.err

    return inspect


def told(text: str) -> dict[str, str]:
    return {line[:12].strip(): line[12:] for line in text.splitlines()}


@pytest.mark.parametrize("architecture", HEADS)
def test_a_hugging_face_directory_of_any_class(saved, inspected, architecture):
    lines = inspected(saved(architecture=architecture, dtype=torch.bfloat16))
    assert lines["format"] == "Hugging Face directory, model.safetensors"
    assert lines["class"] == architecture
    assert lines["sizes"].startswith(
        "layers 5, hidden 16, heads 4, intermediate 24, vocabulary 1003, positions 20"
    )
    assert lines["dtype"] == "bfloat16"
    assert lines["tokenizer"] == "none"
    assert "every tensor" in lines["whole"]


def test_shards_and_pickled_shards(saved, inspected):
    assert "files model-00001-of" in inspected(saved("one", shards=True))["format"]
    save_pickled(saved("other"), shards=3)
    lines = inspected(saved("one").parent / "other")
    assert lines["format"] == "Hugging Face directory, 3 files pytorch_model-00001-of-00003.bin .. " + (
        "pytorch_model-00003-of-00003.bin"
    )
    assert lines["tensors"] == "96"  # the two tied copies too


def test_tensors_are_listed_with_shape_and_number_format(saved, capsys):
    directory = saved()
    path = directory / "model.safetensors"
    values = load_file(path)
    save_file({**values, "bert.encoder.ln.bias": values["bert.encoder.ln.bias"].half()}, path)
    assert convert("inspect", directory, "--tensors") == 0
    out = capsys.readouterr().out
    assert "dtype       float32 (93), float16 (1)\n" in out
    assert "  bert.encoder.ln.bias  [16]  float16\n" in out
    assert "  bert.embeddings.word_embeddings.weight  [1003, 16]  float32\n" in out
    assert sum(line.startswith("  ") for line in out.splitlines()) == 94


@pytest.mark.parametrize("architecture", ["MegatronBertModel", "MegatronBertForTokenClassification"])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_single_file(saved, inspected, architecture, pickled):
    directory = saved(architecture=architecture)
    if pickled:
        save_pickled(directory)
    lines = inspected(directory / ("pytorch_model.bin" if pickled else "model.safetensors"))
    assert lines["format"] == ("torch.save file of tensors" if pickled else "safetensors file")
    assert lines["class"] == f"{architecture}, judged from the tensors"
    assert lines["sizes"] == "layers 5, hidden 16, vocabulary 1003"


def test_a_shard_alone_is_a_part(saved, inspected):
    shard = sorted(saved(shards=True).glob("model-*"))[2]
    assert "does not hold a whole MegatronBert" in inspected(shard)["class"]


def test_a_checkpoint_a_root_and_a_run(tmp_path, inspected):
    facts = {"settings": {"parallel": {"tensor": 2, "pipeline": 2}}}
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    step = save(tmp_path / "checkpoints", SAVED, 7, tensor=2, pipeline=2, kinds=kinds, facts=facts)
    for path in (tmp_path, tmp_path / "checkpoints", step):
        lines = inspected(path)
        assert lines["format"] == "checkpoint of megatron_bert_tp"
        assert lines["step"] == "7"
        assert lines["class"] == "MegatronBertForPreTraining"
        assert lines["layout"] == "written by 4 ranks, tensor 2 x pipeline 2"
        assert lines["optimizer"] == "state is there: exp_avg, exp_avg_sq"
        assert lines["tensors"] == str(3 * 94)
        assert lines["dtype"] == "float32"
        assert lines["whole"] == "every SHA-256 holds (4 files)"
    assert "the checkpoint" in inspected(step / "rank_00001.safetensors")["part of"]


def test_an_imported_checkpoint(saved, tmp_path, inspected):
    from_huggingface(saved(architecture="MegatronBertForQuestionAnswering"), tmp_path / "checkpoint")
    lines = inspected(tmp_path / "checkpoint")
    assert lines["class"] == "MegatronBertForQuestionAnswering"
    assert lines["layout"] == "written by 1 rank"
    assert lines["optimizer"] == "no state; weights alone"


def test_a_flipped_byte_in_a_checkpoint_is_told_after_what_is_known(tmp_path, refused):
    step = save(tmp_path, SAVED, 7, tensor=2)
    path = step / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    lines, problem = refused(tmp_path)
    assert lines["step"] == "7"
    assert "whole" not in lines
    assert "rank_00001.safetensors: its content does not fit the SHA-256" in problem


def test_a_directory_that_lacks_a_tensor_is_told(saved, refused):
    directory = saved()
    path = directory / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "pooler" not in name}, path)
    assert "missing: bert.pooler.dense.bias" in refused(directory)[1]


def touch(path: Path, content: bytes = b"pickled") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def rank_file(folder: Path, *, legacy: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model_optim_rng.pt"
    torch.save({"model": {"a": torch.ones(500)}}, path, _use_new_zipfile_serialization=not legacy)
    return path


def megatron(root: Path) -> Path:
    for rank in (0, 1):
        for stage in (0, 1):
            rank_file(root / "iter_0001000" / f"mp_rank_{rank:02d}_{stage:03d}", legacy=rank == 0)
    touch(root / "latest_checkpointed_iteration.txt", b"1000\n")
    return root


def test_a_megatron_folder_is_known_by_its_names_and_not_unpickled(tmp_path, inspected):
    root = megatron(tmp_path / "megatron")
    for path in (root, root / "iter_0001000"):
        lines = inspected(path)
        assert lines["format"] == "Megatron-LM folder"
        assert lines["layout"] == "tensor 2 x pipeline 2"
        assert lines["bytes"].endswith(" kB")
        assert "from-ngc" in lines["more"]
    assert inspected(root)["step"] == "1000"


def test_a_megatron_folder_without_a_rank_is_told(tmp_path, refused):
    root = megatron(tmp_path / "megatron")
    (root / "iter_0001000" / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    assert "tensor rank 1 and stage 1" in refused(root)[1]


def test_a_zip_of_ngc_is_known_by_its_members(tmp_path, inspected):
    path = tmp_path / "megatron_bert_345m_v0_1_cased.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("latest_checkpointed_iteration.txt", "release")
        archive.write(rank_file(tmp_path), "release/mp_rank_00/model_optim_rng.pt")
    lines = inspected(path)
    assert "megatron_bert_345m" in lines["format"]
    assert lines["step"] == "release"
    assert lines["layout"] == "tensor 1 x pipeline 1"


def test_a_file_of_one_rank_is_not_unpickled(tmp_path, inspected):
    torch.save({"model": {}}, tmp_path / "model_optim_rng.pt")
    assert inspected(tmp_path / "model_optim_rng.pt")["format"] == "Megatron-LM file of one rank"
    rank_file(tmp_path / "old", legacy=True)
    assert "legacy pickle" in inspected(tmp_path / "old" / "model_optim_rng.pt")["format"]


@pytest.mark.parametrize("name", ["nowhere", "empty", "text.txt", "bad.safetensors", "bad.bin"])
def test_what_is_none_of_these_is_told(tmp_path, refused, name):
    (tmp_path / "empty").mkdir()
    for file in ("text.txt", "bad.safetensors", "bad.bin"):
        touch(tmp_path / file, b"nothing of the kind")
    lines, problem = refused(tmp_path / name)
    assert lines == {}
    assert name in problem


@pytest.mark.parametrize("content", [b"pickled", b"", b"PK\x03\x04pickled"])
def test_garbage_in_place_of_a_rank_file_is_told(tmp_path, refused, content):
    path = megatron(tmp_path / "megatron") / "iter_0001000" / "mp_rank_01_001" / "model_optim_rng.pt"
    path.write_bytes(content)
    for place in (path, tmp_path / "megatron"):
        assert "mp_rank_01_001/model_optim_rng.pt: is no whole file of torch.save" in refused(place)[1]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_rank_file_that_is_cut_off_is_told(tmp_path, refused, legacy):
    path = rank_file(tmp_path, legacy=legacy)
    path.write_bytes(path.read_bytes()[: 100 if legacy else -1])
    assert "model_optim_rng.pt" in refused(path)[1]


@pytest.mark.parametrize("content", ["pickled", ""])
def test_garbage_in_a_zip_of_ngc_is_told(tmp_path, refused, content):
    with zipfile.ZipFile(tmp_path / "ngc.zip", "w") as archive:
        archive.writestr("release/mp_rank_00/model_optim_rng.pt", content)
    assert "mp_rank_00/model_optim_rng.pt is no whole file of torch.save" in refused(tmp_path / "ngc.zip")[1]


def test_names_from_files_do_not_steer_the_terminal(tmp_path, capsys):
    save_file({"a\x1b[2Jb\n": torch.ones(1)}, tmp_path / "model.safetensors")
    assert convert("inspect", tmp_path / "model.safetensors", "--tensors") == 0
    assert "  a\\x1b[2Jb\\n  [1]  float32\n" in capsys.readouterr().out
