"""All ranks go on from the same checkpoint, the newest that is whole, and are told what they passed over."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_bert_tp.checkpoint.choose import newest_whole, verified
from megatron_bert_tp.checkpoint.directories import Keep
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.parallel.agreement import Agreement
from tests.checkpoint.layouts import TINY, OneOfThreads, in_threads, save
from tests.support import TIMEOUT

ALONE = Agreement.alone()


@pytest.fixture
def root(tmp_path) -> Path:
    for step in (4, 8, 12):
        save(tmp_path / "root", TINY, step, tensor=2, keep=Keep(last=3), seed=step)
    return tmp_path / "root"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def chosen(root: Path) -> tuple[str | None, list[str]]:
    choice = newest_whole(root, ALONE)
    return choice.checkpoint and choice.checkpoint.directory.name, list(choice.skipped)


def test_nothing_saved_is_no_choice(tmp_path):
    assert chosen(tmp_path) == (None, [])
    assert chosen(tmp_path / "missing") == (None, [])


def test_damage_is_passed_over_until_one_is_whole(root):
    damage(root / "step_00000012" / "rank_00001.safetensors")
    (root / "step_00000008" / "manifest.json").unlink()
    name, skipped = chosen(root)
    assert name == "step_00000004"
    assert skipped == [
        f"{root}/step_00000012/rank_00001.safetensors: its content does not fit the SHA-256 in manifest.json; "
        "the file is damaged, use another checkpoint",
        f"{root}/step_00000008/manifest.json: no such file",
    ]


def test_where_all_are_damaged_all_are_told(root):
    for path in root.glob("step_*"):
        damage(path / "rank_00000.safetensors")
    name, skipped = chosen(root)
    assert (name, len(skipped)) == (None, 3)


def test_an_older_pointer_is_told_and_the_newest_taken(root):
    (root / "latest").write_text("step_00000004\n")
    assert chosen(root) == (
        "step_00000012",
        [f"{root}/latest: names step_00000004, but step_00000012 is the newest that is whole; took that"],
    )


def test_a_pointer_to_what_was_removed_is_told(root):
    shutil.rmtree(root / "step_00000012")
    name, skipped = chosen(root)
    assert name == "step_00000008"
    assert skipped == [
        f"{root}/latest: names step_00000012, but step_00000008 is the newest that is whole; took that"
    ]


def test_a_missing_pointer_is_told(root):
    (root / "latest").unlink()
    assert chosen(root) == (
        "step_00000012",
        [f"{root}/latest: is missing; took step_00000012, the newest that is whole"],
    )


def test_a_save_that_was_not_finished_is_told(root):
    (root / "step_00000016.partial-0123abcd").mkdir()
    name, skipped = chosen(root)
    assert name == "step_00000012"
    assert skipped == [f"{root}/step_00000016.partial-0123abcd: is not finished"]


def test_the_old_one_of_a_step_counts_where_the_new_one_is_not_there(root):
    (root / "step_00000012").rename(root / "step_00000012.replaced")
    assert chosen(root) == ("step_00000012.replaced", [])


def test_the_old_one_of_a_step_counts_where_the_new_one_is_damaged(root):
    shutil.copytree(root / "step_00000012", root / "step_00000012.replaced")
    damage(root / "step_00000012" / "rank_00000.safetensors")
    name, skipped = chosen(root)
    assert name == "step_00000012.replaced"
    assert len(skipped) == 1


def test_a_directory_under_the_name_of_another_step_is_passed_over(root):
    shutil.copytree(root / "step_00000004", root / "step_00000016")
    name, skipped = chosen(root)
    assert name == "step_00000012"
    assert skipped == [
        f"{root}/step_00000016/manifest.json: is of step 4; the directory was renamed, or its files are another's"
    ]


def test_what_only_looks_like_a_checkpoint_is_none(root, tmp_path):
    shutil.copytree(root / "step_00000004", tmp_path / "elsewhere")
    (root / "step_00000099").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(root / "step_00000012", root / "step_000000012")
    shutil.copytree(root / "step_00000012", root / "step_00000020.bak")
    assert chosen(root) == ("step_00000012", [])


def test_an_explicit_path_is_verified_and_never_replaced_by_another(root):
    assert verified(root, ALONE).directory == root / "step_00000012"
    damage(root / "step_00000012" / "rank_00001.safetensors")
    for path in (root, root / "step_00000012"):
        with pytest.raises(CheckpointError, match=r"step_00000012/rank_00001\.safetensors"):
            verified(path, ALONE)


@pytest.mark.parametrize("number", [0, 1])
def test_all_ranks_pass_over_what_one_of_them_finds(root, number):
    """Each of two ranks reads one of the two files."""
    damage(root / "step_00000012" / f"rank_0000{number}.safetensors")
    choices = [None, None]

    def choose(agreement: OneOfThreads) -> None:
        choices[agreement.rank] = newest_whole(root, agreement)

    assert in_threads(2, choose) == [None, None]
    assert choices[0] == choices[1]
    assert choices[0].checkpoint.directory == root / "step_00000008"
    raised = in_threads(2, lambda agreement: verified(root / "step_00000012", agreement))
    assert [type(error) for error in raised] == [CheckpointError] * 2
    assert str(raised[0]) == str(raised[1])


def test_the_ranks_share_the_reading(root):
    checkpoint = Checkpoint.open(root)
    damage(root / "step_00000012" / "rank_00001.safetensors")
    checkpoint.verify(rank=0, size=2)
    with pytest.raises(CheckpointError, match="rank_00001"):
        checkpoint.verify(rank=1, size=2)


def test_hosts_that_see_other_files_are_told(root, tmp_path):
    other = Path(shutil.copytree(root, tmp_path / "other"))
    shutil.rmtree(other / "step_00000012")
    save(other, TINY, 12, tensor=2, keep=Keep(last=3), seed=1)
    raised = in_threads(2, lambda agreement: verified((root, other)[agreement.rank], agreement))
    assert all("rank 1 reads another file there than rank 0" in str(error) for error in raised)


def test_a_path_that_leads_nowhere_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    raised = in_threads(2, lambda agreement: verified(tmp_path / "file" / "root", agreement))
    assert all(isinstance(error, CheckpointError) for error in raised)


def choose_as_rank(root: Path) -> tuple[str, tuple[str, ...]]:
    choice = newest_whole(root, Agreement.of_world(TIMEOUT))
    assert dist.get_world_size() == 3
    assert choice.checkpoint is not None
    return choice.checkpoint.directory.name, choice.skipped


def test_three_real_ranks_choose_alike(root, ranks):
    damage(root / "step_00000012" / "rank_00001.safetensors")
    first, *others = ranks.run(3, choose_as_rank, root)
    assert first[0] == "step_00000008"
    assert "rank_00001.safetensors: its content" in first[1][0]
    assert others == [first, first]
