"""Importing as users do, through a process of its own, and with all that a training leaves in its files."""

import random
import sys
import types
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from tests.formats.megatron import synthetic
from tests.formats.megatron.comparison import assert_same_model, bring
from tests.formats.megatron.synthetic import Kind, write


@pytest.fixture
def training_state(monkeypatch) -> dict[str, object]:
    """What else stands in a file of a training, objects of modules that the reading process has not among them."""

    def foreign(module: str, name: str) -> object:
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            made = types.ModuleType(".".join(parts[:depth]))
            monkeypatch.setitem(sys.modules, made.__name__, made)
        kind = type(name, (), {"__module__": module})
        setattr(made, name, kind)
        found = kind()
        found.state = [1, {"deep": torch.ones(2)}]
        return found

    return {
        "optimizer": {"loss_scaler": foreign("fp16.loss_scaler", "DynamicLossScaler"), "exp_avg": torch.ones(3)},
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "enum": foreign("megatron.model.enums", "AttnMaskType"),
    }


@pytest.mark.parametrize("form", ["zip", "directory", "file", "before torch 1.6"])
def test_a_training_is_read_in_a_process_of_its_own(models, tmp_path, training_state, form):
    arguments = {"attn_mask_type": training_state.pop("enum"), "params_dtype": torch.half, "lr": None}
    kind = Kind(version=0, shuffled=True, arguments=arguments, extra=training_state)
    source = write(models[True], kind, tmp_path / "source")
    file = source / "release" / "mp_rank_00" / "model_optim_rng.pt"
    if form == "before torch 1.6":
        torch.save(synthetic.content(models[True], kind, 0, 0), file, _use_new_zipfile_serialization=False)
    if form == "zip":
        packed = tmp_path / "megatron_bert_345m_v0_1_uncased.zip"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in source.rglob("*"):
                archive.write(path, path.relative_to(source))
        source = packed
    before = sorted(tmp_path.rglob("*"))
    bring(file if form == "file" else source, tmp_path / "out")
    assert_same_model(tmp_path / "out", models[True])
    after = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in (path, *path.parents)}
    assert sorted(after) == before  # nothing stays beside what was asked for


def test_a_zip_of_many_ranks_is_read_by_one_process(models, tmp_path):
    kind = Kind(version=1.0, tensor=2, pipeline=2)
    source = write(models[True], kind, tmp_path / "source", iteration="iter_0000300")
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        for path in source.rglob("*"):
            archive.write(path, Path("bert") / path.relative_to(source))
    bring(tmp_path / "source.zip", tmp_path / "out")
    assert_same_model(tmp_path / "out", models[True])
