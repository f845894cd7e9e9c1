"""Which checkpoints outlive the next one, and what removing follows."""

import shutil
from pathlib import Path

import pytest

from megatron_bert_tp.checkpoint.choose import newest_whole
from megatron_bert_tp.checkpoint.directories import Keep, clear_leftovers, purge, step_directory
from megatron_bert_tp.checkpoint.save import prepare_directory
from megatron_bert_tp.parallel.agreement import Agreement
from tests.checkpoint.layouts import TINY, save


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in root.glob("step_????????"))


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Keep(last=1), [70]),
        (Keep(last=2), [60, 70]),
        (Keep(last=9), [10, 20, 30, 40, 50, 60, 70]),
        (Keep(last=1, every=30), [30, 60, 70]),
        (Keep(last=2, every=30), [30, 60, 70]),
        (Keep(last=3, every=20), [20, 40, 50, 60, 70]),
        (Keep(last=1, every=1000), [70]),
    ],
)
def test_the_newest_and_the_multiples_stay(tmp_path, keep, left):
    for step in range(10, 71, 10):
        step_directory(tmp_path, step).mkdir()
        removed, failures = purge(tmp_path, step, keep)
        assert all(not path.exists() for path in removed)
        assert failures == []
    assert steps(tmp_path) == left


def test_saving_purges_by_both_rules(tmp_path):
    for step in range(2, 13, 2):
        save(tmp_path, TINY, step, keep=Keep(last=1, every=4))
    assert steps(tmp_path) == [4, 8, 12]


def test_a_damaged_newer_one_does_not_cost_an_older_one_its_place(tmp_path):
    """A run that passed over step 9 goes on from 6; step 9 is neither counted nor removed."""
    for step in (3, 6, 9):
        save(tmp_path, TINY, step, keep=Keep(last=3))
    (tmp_path / "step_00000009" / "manifest.json").write_text("")
    save(tmp_path, TINY, 8, keep=Keep(last=2))
    assert steps(tmp_path) == [6, 8, 9]
    choice = newest_whole(tmp_path, Agreement.alone())
    assert choice.checkpoint is not None
    assert choice.checkpoint.step == 8


def test_removing_follows_no_link(tmp_path):
    root, precious = tmp_path / "root", tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("all we have")
    save(root, TINY, 1)
    (root / "step_00000001" / "link").symlink_to(precious)
    (root / "step_00000002").symlink_to(precious)
    (root / "step_00000003.partial-0123abcd").symlink_to(precious)
    (root / "step_00000004.replaced").symlink_to(precious)
    (root / "step_00000005.partial-0123abcd").mkdir()
    (root / "step_00000005.partial-0123abcd" / "link").symlink_to(precious)
    (root / "latest.new").symlink_to(precious / "data")
    save(root, TINY, 6, keep=Keep(last=1))
    assert (precious / "data").read_text() == "all we have"
    links = ["step_00000002", "step_00000003.partial-0123abcd", "step_00000004.replaced"]
    assert sorted(path.name for path in root.iterdir()) == ["latest", *links, "step_00000006"]


def test_what_is_cleared_is_told(tmp_path):
    save(tmp_path, TINY, 1)
    save(tmp_path, TINY, 2)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000001.replaced")
    (tmp_path / "step_00000002.replaced").mkdir()
    for name in ("step_00000003.partial", "step_00000003.partial-0123abcd"):
        (tmp_path / name).mkdir()
    assert clear_leftovers(tmp_path) == [
        f"gave {tmp_path}/step_00000001.replaced its name step_00000001 back: "
        "the save that was to replace it was cut off",
        f"removed {tmp_path}/step_00000003.partial, which was not finished",
        f"removed {tmp_path}/step_00000003.partial-0123abcd, which was not finished",
    ]
    assert steps(tmp_path) == [1, 2]
    assert (tmp_path / "step_00000002.replaced").exists(), "it may be the only one that is whole"
    save(tmp_path, TINY, 3)
    assert not (tmp_path / "step_00000002.replaced").exists()


def test_the_replaced_one_outlives_a_save_that_fails_where_it_is_the_only_whole_one(tmp_path):
    save(tmp_path, TINY, 2)
    shutil.copytree(tmp_path / "step_00000002", tmp_path / "step_00000002.replaced")
    (tmp_path / "step_00000002" / "manifest.json").write_text("")
    prepare_directory(tmp_path / "step_00000003.partial-0123abcd")  # and then a kill
    choice = newest_whole(tmp_path, Agreement.alone())
    assert choice.checkpoint is not None
    assert choice.checkpoint.directory.name == "step_00000002.replaced"


def test_a_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    """As where a network file system keeps a file that someone else has open."""
    save(tmp_path, TINY, 1)
    save(tmp_path, TINY, 2)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    removed, (failure,) = purge(tmp_path, 2, Keep(last=1))
    assert removed == []
    assert failure.startswith(f"cannot remove {tmp_path}/step_00000001: [Errno 16] Device or resource busy; ")
    assert steps(tmp_path) == [2], "no half checkpoint has a good name"
    (again,) = clear_leftovers(tmp_path)
    assert again.startswith(f"cannot remove {tmp_path}/step_00000001.partial-")


def refuse(*_arguments: object, **_options: object) -> None:
    raise OSError(16, "Device or resource busy")
