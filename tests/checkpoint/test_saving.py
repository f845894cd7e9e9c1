"""A save that fails or is killed leaves the previous checkpoint as it was; no rank waits for ever."""

import hashlib
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_bert_tp.checkpoint import directories
from megatron_bert_tp.checkpoint import save as saving
from megatron_bert_tp.checkpoint.directories import Keep, latest_checkpoint, partial_directory, step_directory
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.checkpoint.save import (
    commit_checkpoint,
    prepare_directory,
    save_checkpoint,
    write_rectangles,
)
from megatron_bert_tp.checkpoint.slices import Rectangle
from megatron_bert_tp.errors import CheckpointError, SaveError
from tests.checkpoint.layouts import TINY, held, in_threads, save, stages

COMMIT = {"facts": {}, "attachments": {}, "keep": Keep(last=2)}


class KilledError(Exception):
    """Stands for the end of the process."""


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_facts_step_and_attachments_come_back(tmp_path):
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("[PAD]\n")
    facts = {"samples": 640, "versions": {"torch": "2"}, "split": [96.0, 4.0], "nothing": None}
    save(tmp_path / "root", TINY, 10, facts=facts, attachments={"vocab.txt": vocabulary})
    checkpoint = Checkpoint.open(tmp_path / "root")
    assert checkpoint.step == 10
    assert facts.items() <= dict(checkpoint.facts).items()
    assert checkpoint.attachments["vocab.txt"].read_text() == "[PAD]\n"


def test_the_manifest_has_the_sha256_and_size_of_every_file(tmp_path):
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("[PAD]\n")
    path = save(tmp_path / "root", TINY, tensor=2, attachments={"vocab.txt": vocabulary})
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert {*files, "manifest.json"} == set(names(path))
    for name, record in files.items():
        content = (path / name).read_bytes()
        assert record == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors", "../vocab.txt", "a/b", ""])
def test_an_attachment_needs_a_plain_and_free_name(tmp_path, name):
    with pytest.raises(CheckpointError, match="cannot be the name"):
        save(tmp_path / "root", TINY, attachments={name: Path(__file__)})


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, TINY, step, keep=Keep(last=2))
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000004"]


def test_going_on_from_an_older_checkpoint_leaves_the_later_ones(tmp_path):
    for step in (1, 2, 9):
        save(tmp_path, TINY, step, keep=Keep(last=3))
    save(tmp_path, TINY, 3, keep=Keep(last=1))
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000009"]
    assert Checkpoint.open(tmp_path).step == 3


def test_foreign_files_are_never_removed(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "root" / "step_1.partial").mkdir()
    (tmp_path / "root" / "step_00000001").symlink_to(tmp_path / "kept")
    (tmp_path / "root" / "step_00000002.partial").symlink_to(tmp_path / "kept")
    save(tmp_path / "root", TINY, 5, keep=Keep(last=1))
    assert {"step_1.partial", "step_00000001", "step_00000002.partial"} <= set(names(tmp_path / "root"))
    assert (tmp_path / "kept").is_dir()


def prepared(root: Path, step: int = 2) -> Path:
    partial = partial_directory(root, step, "made")
    prepare_directory(partial)
    return partial


def killed_after_prepare(root: Path) -> None:
    prepared(root)


def killed_after_one_rank(root: Path) -> None:
    write_rectangles(prepared(root), 0, held(stages(TINY, tensor=2)[0]))


def killed_after_writing(root: Path) -> None:
    partial = prepared(root)
    for rank, stage in enumerate(stages(TINY, tensor=2)):
        write_rectangles(partial, rank, held(stage))


@pytest.mark.parametrize("kill", [killed_after_prepare, killed_after_one_rank, killed_after_writing])
def test_a_kill_between_the_phases_leaves_the_previous_checkpoint(tmp_path, kill):
    first = save(tmp_path, TINY, 1)
    kill(tmp_path)
    assert latest_checkpoint(tmp_path) == first
    Checkpoint.open(tmp_path).verify()
    save(tmp_path, TINY, 3)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000003"]


@contextmanager
def kill_before(monkeypatch, number: int):
    """End the process, in effect, before the given effect on the file system; counts them all."""
    done = []

    def watched(function, name):
        def call(*arguments, **options):
            done.append(name)
            if len(done) > number:
                raise KilledError
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for module, name in (
            (saving, "write_text"),
            (saving, "sync"),
            (directories, "sync"),
            (directories, "replace_text"),
            (shutil, "rmtree"),
            (Path, "rename"),
            (Path, "unlink"),
        ):
            patch.setattr(module, name, watched(getattr(module, name), name))
        yield done


@pytest.mark.parametrize("same_step", [False, True])
def test_a_kill_at_any_point_of_the_commit_keeps_a_whole_checkpoint(tmp_path, monkeypatch, same_step):
    points = 0
    while True:
        root = tmp_path / str(points)
        save(root, TINY, 1, keep=Keep(last=1), seed=1)
        step = 1 if same_step else 2
        partial = prepared(root, step)
        write_rectangles(partial, 0, held(stages(TINY, seed=2)[0]))
        with kill_before(monkeypatch, points) as done:
            try:
                commit_checkpoint(partial, step, 1, **{**COMMIT, "keep": Keep(last=1)})
                finished = True
            except KilledError:
                finished = False
        checkpoint = Checkpoint.open(root)
        checkpoint.verify()
        assert checkpoint.step in (1, step)
        prepared(root, 3)
        Checkpoint.open(root).verify()
        save(root, TINY, 3, keep=Keep(last=1))
        assert names(root) == ["latest", "step_00000003"]
        if finished:
            break
        points += 1
    # The manifest and the directory are on the disk before the name, the name before the pointer, and
    # nothing is removed before the pointer has moved.
    renames = ["rename", "rename"] if same_step else ["rename"]
    assert done == ["write_text", "unlink", "sync", *renames, "sync", "replace_text", "unlink", "rename", "rmtree"]


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, TINY, 5, seed=1)
    save(tmp_path, TINY, 5, tensor=2, seed=2)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.verify()
    assert names(tmp_path) == ["latest", "step_00000005"]
    name = "bert.pooler.dense.weight"
    expected = {part.name: part.parameter for part in stages(TINY, seed=2)[0].parts()}[name]
    assert torch.equal(checkpoint.weight(name, (0, 0), (8, 8)), expected)


def saved_by_ranks(root: Path, given: list[list[Rectangle]], step: int = 2) -> list[Exception | None]:
    """What `save_checkpoint` raises on each of some ranks, which are threads."""

    def work(agreement) -> None:
        save_checkpoint(root, step, given[agreement.rank], **COMMIT, agreement=agreement)

    return in_threads(len(given), work)


def test_when_one_rank_cannot_write_all_ranks_raise_and_the_old_checkpoint_stays(tmp_path):
    first = save(tmp_path, TINY, 1)
    given = [held(stage) for stage in stages(TINY, tensor=4)]
    given[2].append(Rectangle("weight/odd", (1,), (0,), torch.zeros(1, dtype=torch.complex64)))
    raised = saved_by_ranks(tmp_path, given)
    assert all(isinstance(error, SaveError) for error in raised)
    assert {str(error) for error in raised} == {str(raised[0])}
    assert "weight/odd: complex64 cannot be saved" in str(raised[0])
    assert latest_checkpoint(tmp_path) == first


def test_a_failed_second_save_of_a_step_is_raised_on_all_ranks_and_the_first_stays(tmp_path):
    save(tmp_path, TINY, 2)
    given = [held(stage) for stage in stages(TINY, tensor=4)]
    del given[2][0]
    assert all(isinstance(error, SaveError) for error in saved_by_ranks(tmp_path, given, step=2))
    Checkpoint.open(tmp_path).verify()


def test_when_rank_0_cannot_make_the_directory_all_ranks_raise(tmp_path):
    (tmp_path / "root").write_text("a file")
    raised = saved_by_ranks(tmp_path / "root", [held(stage) for stage in stages(TINY, tensor=2)])
    assert all(isinstance(error, SaveError) for error in raised)
    assert all(f"{tmp_path}/root" in str(error) and "cannot be made" in str(error) for error in raised)


def test_what_the_system_refuses_one_rank_is_the_message_of_all(tmp_path):
    def work(agreement) -> None:
        wait_for_the_others = agreement.texts  # the third message follows the writing
        partials: list[Path] = []

        def texts(text):
            told = wait_for_the_others(text)
            partials[:] = tmp_path.glob("step_*.partial-*")
            if agreement.rank == 1 and partials:
                (partials[0] / "rank_00001.safetensors").mkdir(exist_ok=True)
            return told

        ranks = SimpleNamespace(rank=agreement.rank, size=agreement.size, texts=texts)
        save_checkpoint(
            tmp_path, 2, [held(stages(TINY)[0]), held(stages(TINY)[0])][agreement.rank], **COMMIT, agreement=ranks
        )

    raised = in_threads(2, work)
    assert all(isinstance(error, SaveError) for error in raised)
    assert all("rank_00001.safetensors: cannot be written: [Errno 21]" in str(error) for error in raised)


def test_a_rank_whose_files_rank_0_does_not_see_is_named(tmp_path):
    partial = prepared(tmp_path)
    write_rectangles(partial, 0, held(stages(TINY)[0]))
    with pytest.raises(SaveError, match=r"rank 1 wrote it, but rank 0 does not see it.*all nodes share"):
        commit_checkpoint(partial, 2, 2, **COMMIT)


def test_other_ranks_do_not_look_at_what_rank_0_renames(tmp_path, monkeypatch):
    """On a network file system they may see the old names for a while."""
    monkeypatch.setattr(saving, "commit_checkpoint", lambda *_arguments, **_options: ([], []))
    assert saved_by_ranks(tmp_path, [held(stage) for stage in stages(TINY, tensor=2)]) == [None, None]


def test_a_bug_in_one_rank_is_raised_there_and_named_on_the_others(tmp_path):
    given = [held(stage) for stage in stages(TINY, tensor=2)]
    given[1] = [None]  # type: ignore[list-item]
    raised = saved_by_ranks(tmp_path, given)
    assert isinstance(raised[1], AttributeError)
    assert isinstance(raised[0], SaveError)
    assert "AttributeError on rank 1" in str(raised[0])


def test_a_part_that_no_rank_hands_in_is_noticed(tmp_path):
    given = [held(stage) for stage in stages(TINY, tensor=2)]
    lost = next(n for n, part in enumerate(given[1]) if part.name.endswith("query.weight"))
    del given[1][lost]
    error = saved_by_ranks(tmp_path, given)[0]
    assert "query.weight: the rectangles hold 32 of the 64 numbers" in str(error)
    assert latest_checkpoint(tmp_path) is None


def test_a_part_that_two_ranks_hand_in_is_noticed(tmp_path):
    given = [held(stage) for stage in stages(TINY, tensor=2)]
    bias = next(part for part in given[0] if part.name.endswith("pooler.dense.bias"))
    error = saved_by_ranks(tmp_path, [given[0], [*given[1], bias]])[0]
    assert "pooler.dense.bias: the rectangles" in str(error)
    assert "overlap" in str(error)


def test_a_part_outside_its_tensor_is_noticed(tmp_path):
    error = saved_by_ranks(tmp_path, [[Rectangle("weight/a", (2,), (1,), torch.zeros(2))]])[0]
    assert "does not lie inside the shape (2,)" in str(error)


def test_ranks_that_disagree_on_a_shape_are_noticed(tmp_path):
    given = [[Rectangle("weight/a", (n,), (0,), torch.zeros(n))] for n in (2, 3)]
    assert "disagree on shape" in str(saved_by_ranks(tmp_path, given)[0])


def test_one_rank_hands_in_one_rectangle_of_a_tensor(tmp_path):
    given = [Rectangle("weight/a", (2,), (n,), torch.zeros(1)) for n in (0, 1)]
    assert "two rectangles of one tensor" in str(saved_by_ranks(tmp_path, [given])[0])


def test_a_step_directory_has_eight_digits_or_more():
    assert step_directory(Path("a"), 100).name == "step_00000100"
    assert step_directory(Path("a"), 10**9).name == "step_1000000000"
