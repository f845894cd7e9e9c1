"""A folder that some rank does not share is found at the start, and the host is named."""

import ctypes
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_bert_tp.errors import DirectoryError
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.reliability.visibility import check_visible

CLONE_FS, CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_RDONLY, MS_REMOUNT, MS_BIND = (
    0x200,
    0x20000,
    0x4000,
    0x40000,
    1,
    32,
    4096,
)


def outcome(folder: Path, agreement: Agreement, **options: object) -> str:
    """What is told on this rank; empty when the folder passes."""
    started = time.monotonic()
    try:
        check_visible(folder, agreement, patience=0.5, **options)
    except DirectoryError as error:
        return str(error)
    finally:
        assert time.monotonic() - started < 10
    return ""


def check_folders(folders: list[Path], options: dict[str, object]) -> str:
    agreement = Agreement.of_world(timedelta(seconds=30))
    return outcome(folders[agreement.rank], agreement, **options)


@contextmanager
def private_mount(folder: Path, kind: str) -> Iterator[None]:
    """Another, or a read-only, file system at ``folder``, which this thread alone sees."""
    library = ctypes.CDLL(None, use_errno=True)
    own, here = os.open("/proc/self/ns/mnt", os.O_RDONLY), os.open(".", os.O_RDONLY)
    assert library.unshare(CLONE_FS) == 0  # without it a thread cannot leave the namespace alone
    assert library.unshare(CLONE_NEWNS) == 0
    try:
        path = str(folder).encode()
        assert library.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
        if kind == "other":
            assert library.mount(b"tmpfs", path, b"tmpfs", 0, None) == 0
        else:
            assert library.mount(path, path, None, MS_BIND, None) == 0
            assert library.mount(None, path, None, MS_BIND | MS_REMOUNT | MS_RDONLY, None) == 0
        yield
    finally:
        assert library.setns(own, CLONE_NEWNS) == 0
        os.fchdir(here)
        os.close(own)
        os.close(here)


def check_with_mounts(folder: Path, kind: str, blind: tuple[int, ...], options: dict[str, object]) -> str:
    agreement = Agreement.of_world(timedelta(seconds=30))
    with private_mount(folder, kind) if agreement.rank in blind else nullcontext():
        return outcome(folder, agreement, **options)


def can_mount() -> bool:
    with open("/proc/self/status") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff"))
    return bool(mask >> 21 & 1)  # CAP_SYS_ADMIN


needs_mounts = pytest.mark.skipif(not can_mount(), reason="may not mount")


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    made = [tmp_path / f"node{number}" for number in range(4)]
    for folder in made:
        folder.mkdir()
    return made


def contents(folders: list[Path]) -> list[list[Path]]:
    return [list(folder.iterdir()) for folder in folders]


def test_a_folder_that_all_share_passes_and_nothing_stays(ranks, folders):
    assert ranks.run(4, check_folders, [folders[0]] * 4, {}) == [""] * 4
    assert contents(folders) == [[]] * 4


def test_a_missing_folder_is_made(ranks, tmp_path):
    folder = tmp_path / "a" / "b"
    assert ranks.run(2, check_folders, [folder] * 2, {}) == [""] * 2
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("blind", [(1,), (3,), (1, 2), (1, 2, 3)])
def test_ranks_that_see_another_folder_are_named_on_every_rank(ranks, folders, blind):
    seen = [folders[1] if rank in blind else folders[0] for rank in range(4)]
    told = ranks.run(4, check_folders, seen, {"what": "run.index_cache"})
    who = f"{socket.gethostname()} (rank {', '.join(map(str, blind))}) does not see what the first rank writes"
    for folder, text in zip(seen, told, strict=True):
        assert text.startswith(f"run.index_cache ({folder}): {who}")
        assert "file system that all nodes share" in text
    assert contents(folders) == [[]] * 4


def test_the_first_rank_alone_elsewhere_is_found_too(ranks, folders):
    told = ranks.run(2, check_folders, [folders[1], folders[0]], {})
    assert all("(rank 1) does not see" in text for text in told)


def test_a_folder_of_the_same_name_with_an_old_token_is_not_taken_for_it(ranks, folders):
    """The names that are drawn differ from check to check."""
    ranks.run(2, check_folders, [folders[0]] * 2, {})
    (folders[1] / ".seen-00000000000000000000000000000000").write_text(".seen-00000000000000000000000000000000")
    assert all(ranks.run(2, check_folders, [folders[0], folders[1]], {}))


@pytest.mark.parametrize("blocked", [0, 1])
def test_a_file_in_place_of_the_folder_is_told_by_all(ranks, folders, blocked):
    file = folders[2] / "file"
    file.write_text("")
    seen = [file if rank == blocked else folders[0] for rank in range(2)]
    told = ranks.run(2, check_folders, seen, {})
    fault = "cannot write into it (" if blocked == 0 else "does not see what the first rank writes there"
    assert all(f"(rank {blocked}) {fault}" in text for text in told)


@needs_mounts
def test_a_private_mount_at_the_same_path_is_found(ranks, tmp_path):
    """As in a container, or where a shared disk was not mounted on one node."""
    told = ranks.run(2, check_with_mounts, tmp_path, "other", (1,), {})
    assert all("(rank 1) does not see what the first rank writes there" in text for text in told)


@needs_mounts
@pytest.mark.parametrize("blind", [0, 1])
def test_a_mount_that_one_rank_cannot_write_is_found(ranks, tmp_path, blind):
    told = ranks.run(2, check_with_mounts, tmp_path, "read-only", (blind,), {})
    assert all(f"(rank {blind}) cannot write into it (Read-only file system)" in text for text in told)
    assert list(tmp_path.iterdir()) == []


@needs_mounts
def test_a_folder_that_may_be_read_only_passes_when_it_is(ranks, tmp_path):
    told = ranks.run(2, check_with_mounts, tmp_path, "read-only", (0, 1), {"may_be_read_only": True})
    assert told == ["", ""]


def test_one_process_checks_that_it_can_write(tmp_path):
    assert outcome(tmp_path / "new", Agreement.alone()) == ""
    (tmp_path / "file").write_text("")
    assert "cannot write into it" in outcome(tmp_path / "file", Agreement.alone())
