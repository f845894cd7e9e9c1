"""Every byte region of a checkpoint, flipped or cut: found before a weight is read, and the file is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bert_tp.checkpoint import read
from megatron_bert_tp.checkpoint.choose import newest_whole, verified
from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.parallel.agreement import Agreement
from tests.checkpoint.layouts import TINY, save

SHARDS = ("rank_00000.safetensors", "rank_00001.safetensors")
MANIFEST, WORDS, POINTER = "manifest.json", "vocab.txt", "latest"
BEFORE, NEWEST = "step_00000004", "step_00000008"
ALONE = Agreement.alone()

Damage = Callable[[Path], None]
"""Does something to the newest checkpoint's directory."""


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    (folder / "words").write_text("[PAD]\n[UNK]\nwords\n")
    for step in (4, 8):
        kinds = ("weight", "exp_avg", "exp_avg_sq")
        save(folder / "root", TINY, step, tensor=2, kinds=kinds, attachments={WORDS: folder / "words"}, seed=step)
    return folder / "root"


@pytest.fixture
def root(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "root"))


def header_size(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


def position_in(region: str, share: float, content: bytes) -> int:
    """Byte at ``share`` of a region of a safetensors file, or of a whole file."""
    data = 8 + header_size(content) if region in ("header", "numbers") else 0
    first, last = {
        "length": (0, 8),
        "header": (8, data),
        "numbers": (data, len(content)),
        "file": (0, len(content)),
    }[region]
    return min(last - 1, first + int(share * (last - first)))


def flipped(name: str, region: str, share: float, bit: int) -> Damage:
    def damage(step: Path) -> None:
        content = bytearray((step / name).read_bytes())
        content[position_in(region, share, bytes(content))] ^= 1 << bit
        (step / name).write_bytes(content)

    return damage


def cut(name: str, region: str, share: float) -> Damage:
    def damage(step: Path) -> None:
        content = (step / name).read_bytes()
        (step / name).write_bytes(content[: position_in(region, share, content)])

    return damage


def zeroed(name: str, share: float) -> Damage:
    """A block that the disk lost reads as zeros."""

    def damage(step: Path) -> None:
        content = bytearray((step / name).read_bytes())
        first = position_in("numbers", share, bytes(content))
        content[first : first + 64] = bytes(len(content[first : first + 64]))
        (step / name).write_bytes(content)

    return damage


def grown(name: str, more: bytes) -> Damage:
    return lambda step: (step / name).write_bytes((step / name).read_bytes() + more) and None


def emptied(name: str) -> Damage:
    return lambda step: (step / name).write_bytes(b"") and None


def missing(name: str) -> Damage:
    return lambda step: (step / name).unlink()


def added(name: str) -> Damage:
    return lambda step: shutil.copyfile(step / SHARDS[0], step / name) and None


def swapped(one: str, other: str) -> Damage:
    def damage(step: Path) -> None:
        (step / one).rename(step / "third")
        (step / other).rename(step / one)
        (step / "third").rename(step / other)

    return damage


def of_the_one_before(name: str) -> Damage:
    return lambda step: shutil.copyfile(step.parent / BEFORE / name, step / name) and None


def linked(name: str) -> Damage:
    """The right bytes, but somewhere else, where anybody may change them."""

    def damage(step: Path) -> None:
        elsewhere = step.parent / f"elsewhere-{name}"
        (step / name).rename(elsewhere)
        (step / name).symlink_to(elsewhere)

    return damage


def replaced_by_a_folder(name: str) -> Damage:
    def damage(step: Path) -> None:
        (step / name).unlink()
        (step / name).mkdir()

    return damage


def flips() -> dict[str, tuple[str, Damage]]:
    places = [(name, "length", number / 8, number) for name in SHARDS for number in range(8)]
    places += [(name, "header", number / 24, number % 8) for name in SHARDS for number in range(25)]
    places += [(name, "numbers", number / 24, number % 8) for name in SHARDS for number in range(25)]
    places += [(WORDS, "file", number / 8, number % 8) for number in range(9)]
    places += [(MANIFEST, "file", number / 48, number % 8) for number in range(49)]
    return {
        f"flip-{n}-{region}-{share:.3f}": (n, flipped(n, region, share, bit)) for n, region, share, bit in places
    }


def cuts() -> dict[str, tuple[str, Damage]]:
    places = [(name, "length", share) for name in SHARDS for share in (0, 0.5)]
    places += [
        (name, region, share) for name in SHARDS for region in ("header", "numbers") for share in (0, 0.5, 1)
    ]
    places += [(name, "file", share) for name in (WORDS, MANIFEST) for share in (0, 0.2, 0.5, 0.9, 1)]
    return {f"cut-{name}-{region}-{share}": (name, cut(name, region, share)) for name, region, share in places}


def others() -> dict[str, tuple[str, Damage]]:
    files = (*SHARDS, WORDS, MANIFEST)
    makers = (emptied, missing, of_the_one_before, linked, replaced_by_a_folder)
    cases = {f"{make.__name__}-{name}": (name, make(name)) for make in makers for name in files}
    del cases[f"of_the_one_before-{WORDS}"]  # they are the same
    # A whole manifest, but of other files: told is the first file that does not fit it.
    cases[f"of_the_one_before-{MANIFEST}"] = (SHARDS[0], of_the_one_before(MANIFEST))
    cases |= {f"zeroed-{name}-{share}": (name, zeroed(name, share)) for name in SHARDS for share in (0, 0.5, 0.9)}
    cases |= {
        f"grown-{name}-{len(more)}": (name, grown(name, more)) for name in files for more in (b"\0", b"\n" * 9)
    }
    cases |= {f"added-{name}": (name, added(name)) for name in ("rank_00002.safetensors", "rank_00000.json", "x")}
    cases["swapped-shards"] = (SHARDS[0], swapped(*SHARDS))
    cases["swapped-shard-and-words"] = (SHARDS[0], swapped(SHARDS[0], WORDS))
    return cases


CASES = {**flips(), **cuts(), **others()}


def test_there_are_two_hundred_cases():
    assert len(CASES) >= 200


@pytest.mark.parametrize("case", CASES)
def test_damage_is_found_before_a_weight_is_read_and_the_checkpoint_before_is_taken(root, case, monkeypatch):
    name, damage = CASES[case]
    damage(root / NEWEST)

    def opened(path: Path) -> None:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(read, "_open", opened)
    with pytest.raises(CheckpointError) as refused:
        verified(root / NEWEST, ALONE)
    assert str(root / NEWEST / name) in str(refused.value)
    choice = newest_whole(root, ALONE)
    assert choice.checkpoint is not None
    assert choice.checkpoint.directory == root / BEFORE
    assert [line for line in choice.skipped if f"{root / NEWEST / name}: " in line]


def test_what_is_not_damaged_is_taken(root):
    choice = newest_whole(root, ALONE)
    assert choice.checkpoint is not None
    assert (choice.checkpoint.directory, choice.skipped) == (root / NEWEST, ())
    assert verified(root, ALONE).directory == root / NEWEST


POINTERS = {
    "empty": b"",
    "cut": b"step_0000",
    "without a name": b"\n",
    "a way out": b"../root/step_00000008\n",
    "absolute": b"/etc/passwd",
    "no text": b"\xff\xfe\0",
    "two lines": b"step_00000008\nstep_00000004\n",
    "a space": b"step_00000008 \n",
    "other digits": "step_0000000\u0668\n".encode(),
    "longer than a name": b"step_" + b"0" * 10_000_000 + b"8",
}
FLIPPED_POINTERS = {
    f"byte {number}": bytes(
        byte ^ (1 << (number % 3) if place == number else 0) for place, byte in enumerate(whole)
    )
    for whole in (f"{NEWEST}\n".encode(),)
    for number in range(len(whole))
}


@pytest.mark.parametrize("case", [*POINTERS, *FLIPPED_POINTERS])
def test_a_damaged_pointer_decides_nothing_and_is_told(root, case):
    (root / POINTER).write_bytes({**POINTERS, **FLIPPED_POINTERS}[case])
    choice = newest_whole(root, ALONE)
    assert choice.checkpoint is not None
    assert choice.checkpoint.directory == root / NEWEST
    assert [line for line in choice.skipped if str(root / POINTER) in line]
    with pytest.raises(CheckpointError, match="latest: "):
        verified(root, ALONE)


def test_facts_that_were_changed_together_with_their_digest_in_another_form_are_refused(root):
    """The one form of the file leaves no second way to write the same."""
    path = root / NEWEST / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(CheckpointError, match=r"manifest\.json: is not in the form in which it was written"):
        verified(root / NEWEST, ALONE)
