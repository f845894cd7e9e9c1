"""A folder where the `datasets` library is missing, and one that is none of its folders."""

import sys

from tests.tasks.reading import refusal, write


def test_a_folder_of_another_kind_is_told(tmp_path):
    write(tmp_path / "train" / "a.csv", "text,label", "a,x")
    told = refusal("classification", tmp_path / "train")
    assert told.startswith(
        f"{tmp_path / 'train'}: is a folder without state.json, so not one of datasets.save_to_disk"
    )


def test_the_missing_library_is_told_with_the_way_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as Python marks a module that cannot be imported
    write(tmp_path / "train" / "state.json", "{}")
    told = refusal("classification", tmp_path / "train")
    assert told.endswith("install it with `pip install 'megatron-bert-tp[datasets]'`")
