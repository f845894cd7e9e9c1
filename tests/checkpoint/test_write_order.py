"""What is done to the disk, in which order: whatever is named is on the disk before its name is."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.killed import save_as_ranks
from tests.sources import ROOT

SAVE = "import sys; from pathlib import Path; from tests.checkpoint.killed import save_as_ranks\n"
SAVE += "save_as_ranks(Path(sys.argv[1]), int(sys.argv[2]), length=10)"
CALL = re.compile(
    r"(?P<name>openat|fsync|fdatasync|rename\w*|unlink\w*|rmdir|mkdir)\((?P<arguments>.*?)\) += (?P<result>-?\d+)"
)
TOKEN = re.compile(r"\.partial-\w{8}")


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> list[str]:
    """Calls of the system that save step 2 beside step 1, as ``fsync step_00000002.partial/rank_00000.json``."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace")
    root, log = tmp_path_factory.mktemp("order") / "root", tmp_path_factory.mktemp("log") / "log"
    save_as_ranks(root, 1, length=10)
    calls = "trace=openat,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir"
    command = [strace, "-f", "-y", "-e", calls, "-o", str(log), sys.executable, "-c", SAVE, str(root), "2"]
    subprocess.run(command, cwd=ROOT, check=True, env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"})
    return [call for line in whole_lines(log.read_text().splitlines()) if (call := told(line, root))]


def whole_lines(lines: list[str]) -> Iterator[str]:
    """Lines of the trace; a call during which another thread was heard is put together where it ends."""
    begun: dict[str, str] = {}
    for line in lines:
        thread, _, call = line.partition(" ")
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>")
        elif " resumed>" in call:
            yield begun.pop(thread, "") + call.partition(" resumed>")[2]
        else:
            yield call


def told(line: str, root: Path) -> str | None:
    """A call of the trace that changes something in ``root``; readers are left out."""
    match = CALL.search(line)
    if match is None or str(root) not in line or int(match["result"]) < 0:
        return None
    name, arguments = match["name"], match["arguments"]
    if name == "openat" and "O_CREAT" not in arguments:
        return None
    paths = re.findall(rf"{re.escape(str(root))}(?:/[^\"<>,]*)?", arguments)
    names = [TOKEN.sub(".partial", str(Path(path).relative_to(root))) for path in dict.fromkeys(paths)]
    return " ".join([re.sub(r"at2?$", "", name).replace("open", "create"), *names])


def place(traced: list[str], call: str) -> int:
    return traced.index(call)


WHOLE, PARTIAL = "step_00000002", "step_00000002.partial"
FILES = [f"rank_{rank:05d}.{suffix}" for rank in range(3) for suffix in ("safetensors", "json")]


@pytest.mark.parametrize("name", [*FILES, "words", "manifest.json"])
def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(traced, name):
    created, synced = (place(traced, f"{verb} {PARTIAL}/{name}") for verb in ("create", "fsync"))
    assert created < synced < place(traced, f"rename {PARTIAL} {WHOLE}")


def test_all_files_of_the_ranks_are_on_the_disk_before_the_manifest_is_begun(traced):
    begun = place(traced, f"create {PARTIAL}/manifest.json")
    assert all(place(traced, f"fsync {PARTIAL}/{name}") < begun for name in FILES)


def test_the_directory_is_renamed_then_the_pointer_then_the_old_one_is_removed(traced):
    order = [
        f"create {PARTIAL}/manifest.json",
        f"fsync {PARTIAL}/manifest.json",
        f"fsync {PARTIAL}",
        f"rename {PARTIAL} {WHOLE}",
        "fsync .",
        "create latest.new",
        "fsync latest.new",
        "rename latest.new latest",
    ]
    places = [place(traced, call) for call in order]
    assert places == sorted(places)
    # The name of the pointer is on the disk too before anything is removed.
    after = traced[places[-1] + 1 :]
    assert after[:2] == ["fsync .", "rename step_00000001 step_00000001.partial"]


def test_nothing_is_written_in_place(traced):
    created = [call.removeprefix("create ") for call in traced if call.startswith("create ")]
    assert all(name.startswith(f"{PARTIAL}/") or name == "latest.new" for name in created)
    assert len(created) == len(set(created))
