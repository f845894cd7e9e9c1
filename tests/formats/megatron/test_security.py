"""Files from strangers run no code and write nothing but what was asked for."""

import json
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.megatron import archive, isolated
from megatron_bert_tp.formats.megatron.convert import from_megatron
from megatron_bert_tp.formats.megatron.unpickle import extract_all
from tests.formats.megatron import synthetic
from tests.formats.megatron.audit import CANARY, Event, audited
from tests.formats.megatron.synthetic import Kind, write


class Evil:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def shell(folder: Path) -> str:
    return f"touch {folder / CANARY}"


ATTACKS: dict[str, tuple[Callable[[Path], Evil], str]] = {
    "system": (lambda folder: Evil(os.system, shell(folder)), "posix.system"),
    "eval": (lambda _: Evil(eval, f"'{CANARY}' and 1"), "builtins.eval"),
    "exec": (lambda _: Evil(exec, f"x = '{CANARY}'"), "builtins.exec"),
    "open": (lambda folder: Evil(open, str(folder / CANARY), "w"), "io.open"),
    "popen": (lambda folder: Evil(subprocess.Popen, ["touch", str(folder / CANARY)]), "subprocess.Popen"),
    "getattr": (lambda _: Evil(getattr, Evil(__import__, "os"), "system"), "builtins.getattr"),
    "hub": (lambda folder: Evil(torch.hub.load, str(folder), CANARY), "torch.hub.load"),
}
AUDITED = ("system", "eval", "open", "popen")  # each costs the start of a process
PROGRAM = """
import sys
from pathlib import Path
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.megatron.convert import from_megatron

for source in sys.argv[1:]:
    try:
        print("read", from_megatron(Path(source), Path(source + ".out"), tell=lambda _: None).replace("\\n", " "))
    except FormatError as error:
        print("refused", str(error).replace("\\n", " "))
"""


@pytest.fixture(scope="module")
def attacks(models, tmp_path_factory) -> tuple[dict[str, str], list[Event], Path]:
    """What became of every attack, all that the importing processes did, and where."""
    folder = tmp_path_factory.mktemp("attacks") / "here"  # what they leave beside it is theirs
    folder.mkdir()
    content = synthetic.content(models[True], Kind(), 0, 0)
    for name in AUDITED:
        save_attack(content, name, folder)
    make_zip(folder / "slip.zip", {f"../{CANARY}": b"x"})
    make_zip(folder / "bomb.zip", {"release/mp_rank_00/model_optim_rng.pt": bytes(50_000_000)})
    torch.save({**content, "bomb": Evil(bytearray, 3 * 10**9)}, folder / "memory.pt")
    torch.save(content, folder / "good.pt")
    names = [path.name for path in sorted(folder.iterdir())]
    output, events = audited(folder / "audit", PROGRAM, *(str(folder / name) for name in names))
    return dict(zip(names, output.splitlines(), strict=True)), events, folder


def save_attack(content: dict[str, object], name: str, folder: Path) -> Path:
    """File with an attack among the arguments or elsewhere, in the form of either age."""
    number, evil, path = list(ATTACKS).index(name), ATTACKS[name][0](folder), folder / f"{name}.pt"
    hidden = {"args": evil} if number % 2 else {"rng": [evil]}
    torch.save({**content, **hidden}, path, _use_new_zipfile_serialization=number % 3 > 0)
    return path


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return path


@pytest.mark.parametrize("name", AUDITED)
def test_a_malicious_pickle_is_refused_by_the_name_that_it_asks_for(attacks, name):
    outcome = attacks[0][f"{name}.pt"]
    assert outcome.startswith(f"refused {attacks[2] / name}.pt: ")
    assert ATTACKS[name][1] in outcome
    assert "weights_only" not in outcome  # torch's advice on how to load it all the same


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_refused_by_the_one_that_unpickles(models, tmp_path, name):
    path = save_attack(synthetic.content(models[True], Kind(), 0, 0), name, tmp_path)
    with pytest.raises(FormatError, match=re.escape(ATTACKS[name][1])):
        extract_all([("it", str(path))], tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_unpickled_in_the_middle_of_attacks_is_read(attacks):
    assert attacks[0]["good.pt"].startswith("read ")
    assert (attacks[2] / "good.pt.out" / "model.safetensors").is_file()


def test_a_zip_that_leads_out_and_one_that_explodes_are_refused(attacks):
    assert "leads out of the folder" in attacks[0]["slip.zip"]
    assert "unpacks from" in attacks[0]["bomb.zip"]


def test_a_pickle_that_wants_all_memory_is_refused(attacks):
    assert attacks[0]["memory.pt"].startswith(f"refused {attacks[2] / 'memory.pt'}: needs more memory")


def test_no_attack_ran_anything(attacks):
    _, events, folder = attacks
    started = [event for event in events if event.name == "subprocess.Popen"]
    assert {event.name for event in events} <= {"open", "os.mkdir", "os.rename", "subprocess.Popen"}
    assert all("'megatron_bert_tp.formats.megatron.unpickle'" in event.what for event in started)
    assert len(started) == len(AUDITED) + 2  # one child for each file that is unpickled
    assert not list(folder.parent.rglob(f"{CANARY}*"))


def test_no_attack_wrote_anything_outside_of_the_folder_asked_for(attacks):
    _, events, folder = attacks
    changes = [event.what for event in events if event.name in ("open", "os.mkdir", "os.rename")]
    assert changes
    places = [path for what in changes for path in strings(what) if path not in ("/dev/null", str(folder))]
    outside = [path for path in places if ".pt.out" not in path and ".zip.out" not in path]
    assert outside == []
    assert all(Path(path).is_relative_to(folder) for path in places)
    left = {path.name for path in folder.iterdir()}
    assert left == {*attacks[0], "audit", "good.pt.out"}


def strings(shown: str) -> list[str]:
    """Texts in a shown value: paths of events."""
    return [first or second for first, second in re.findall(r"'([^']*)'|\"([^\"]*)\"", shown)]


def test_the_audit_sees_what_an_attack_does(tmp_path):
    attack = tmp_path / "attack"
    attack.write_bytes(b"".join(pickle.dumps(ATTACKS[name][0](tmp_path)) for name in ("system", "eval", "open")))
    program = "import pickle, sys\nwith open(sys.argv[1], 'rb') as f:\n    for _ in range(3): pickle.load(f)"
    _, events = audited(tmp_path / "audit", program, str(attack))
    assert {event.name for event in events} >= {"os.system", "compile", "open", "pickle.find_class"}
    assert (tmp_path / CANARY).exists()


# Zip files


def refused(source: Path, message: str) -> None:
    """The import refuses a file with this message, and leaves everything as it was around it.

    It is moved into folders of its own first: two floors above it are the temporary folders of other tests.
    """
    around = source.parent / "around"
    folder = around / "b" / "a"
    folder.mkdir(parents=True)
    moved = source.rename(folder / source.name)
    before = sorted(around.rglob("*"))
    with pytest.raises(FormatError, match=message):
        from_megatron(moved, folder / "out", tell=lambda _: None)
    assert sorted(around.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../outside", "/tmp/outside", "C:/outside", "C:outside", "..\\outside", "a/.."]
)
def test_members_that_lead_out_are_refused(tmp_path, name):
    refused(make_zip(tmp_path / "source.zip", {name: b"x"}), "leads out of the folder")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_are_refused(tmp_path, kind):
    member = zipfile.ZipInfo("release/mp_rank_00/model_optim_rng.pt")
    member.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as packed:
        packed.writestr(member, "/etc/passwd")
    refused(tmp_path / "source.zip", "is a link or a device")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as packed:
        packed.writestr("a", "1")
        packed.writestr("a", "2")
    refused(tmp_path / "source.zip", "'a' is in it twice")


def test_too_many_members_are_refused(tmp_path):
    source = make_zip(tmp_path / "source.zip", {str(number): b"" for number in range(archive.LARGEST_COUNT + 1)})
    refused(source, "has 4097 members; at most 4096")


def test_a_list_of_members_is_not_read_when_it_is_too_long(tmp_path):
    source = make_zip(tmp_path / "source.zip", {f"{number}{'x' * 1000}": b"" for number in range(4100)})
    refused(source, "its list of members has")


def test_a_bomb_of_many_small_members_is_refused(tmp_path):
    source = make_zip(tmp_path / "source.zip", {str(number): bytes(900_000) for number in range(30)})
    refused(source, "times as much")


def test_a_zip_larger_than_any_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LARGEST_SIZE", 1000)
    refused(make_zip(tmp_path / "source.zip", {"a": os.urandom(2000)}), "at most 1.0 kB are credible")


@pytest.mark.parametrize("claimed", [10, 99_999, 100_001])
def test_a_member_that_is_longer_or_shorter_than_the_zip_says_is_refused(tmp_path, claimed):
    name = "release/mp_rank_00/model_optim_rng.pt"
    source = make_zip(tmp_path / "source.zip", {name: os.urandom(100_000)})
    data = bytearray(source.read_bytes())
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # both headers tell the same lie
        struct.pack_into("<I", data, data.index(signature) + place, claimed)
    source.write_bytes(data)
    refused(source, "cannot be unpacked|has not the")


def test_a_damaged_zip_is_refused(tmp_path):
    source = make_zip(tmp_path / "source.zip", {"release/mp_rank_00/model_optim_rng.pt": os.urandom(10_000)})
    data = bytearray(source.read_bytes())
    data[5000] ^= 1
    source.write_bytes(data)
    refused(source, "cannot be unpacked .*damaged")


def test_an_encrypted_zip_is_refused(tmp_path):
    source = make_zip(tmp_path / "source.zip", {"release/mp_rank_00/model_optim_rng.pt": b"x"})
    data = bytearray(source.read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + place] |= 1
    source.write_bytes(data)
    refused(source, "cannot be unpacked .*encrypted")


# The child


def test_a_child_that_takes_too_long_is_given_up(models, tmp_path, monkeypatch):
    source = write(models[True], Kind(), tmp_path / "source")
    monkeypatch.setattr(isolated, "_START_SECONDS", 0.05)
    refused(source, "was not unpickled within 0 seconds; given up")


@pytest.mark.parametrize(
    ("script", "message"),
    [("kill -9 $$", "was killed by SIGKILL; it may have needed more memory"), ("exit 7", "ended with code 7")],
)
def test_a_child_that_dies_is_one_message(models, tmp_path, monkeypatch, script, message):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho trouble >&2\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    refused(write(models[True], Kind(), tmp_path / "source"), message)


def test_facts_that_come_back_are_plain(models, tmp_path):
    arguments = {"deep": {"a": 1}, "text": "t" * 2000, "huge": 2**80, "endless": float("inf"), "kept": [1]}
    write(models[True], Kind(arguments=arguments), tmp_path / "source")
    path = tmp_path / "source" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    isolated.unpickle_in_child([isolated.PickledFile("it", path)], tmp_path)
    found = json.loads((tmp_path / "0.json").read_text())["arguments"]
    assert found.keys() == synthetic._arguments(Kind()).keys()
