"""What the pickles in a file of `torch.save` ask for by name, found without unpickling, and what they may get.

* `argparse.Namespace` and its like: a bag for plain values.
* Classes of other packages, and a few plain ones of Python and numpy: an inert stub; nothing is imported.
* torch's own allow-list of tensors, storages and number formats: torch sees to it.
* All else in Python and numpy: refused by name.
"""

import pickletools
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from megatron_bert_tp.errors import FormatError

# The start of every file of torch.save before torch 1.6: its magic number, pickled.
OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
ZIP_MAGIC = b"PK\x03\x04"
_OLD_PICKLES = 5  # magic number, protocol, numbers of the system, content, keys of the storages
_LARGEST_END = 22 + 20 + 56  # bytes: the last record of a zip, with the two of a large zip before it
_TWO_LISTS = "its list of members is not where its last bytes say; torch.save writes no such file"
_LARGEST_PICKLE = 256 * 2**20  # bytes
_TORCHS_OWN = {
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.set",
    "builtins.complex",
}
_BAGS = {"argparse.Namespace", "types.SimpleNamespace"}
# Parts of random states and of settings; without any use here, so a stub does for them.
_STUBBED = {
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
    "io.BytesIO",
    "_io.BytesIO",
    "pathlib.PosixPath",
    "signal.Signals",
}


class Stub:
    """Stands for an object of an unknown class, and forgets whatever it is given."""

    __slots__ = ()

    def __new__(cls, *_arguments: object) -> "Stub":
        """Take what the class would have taken."""
        return super().__new__(cls)

    def __init__(self, *_arguments: object) -> None:
        """Forget."""

    def __setstate__(self, _state: object) -> None:
        """Forget."""


class Bag(Stub):
    """Stands for an `argparse.Namespace`: keeps the values and can do nothing."""

    __slots__ = ("values",)

    def __setstate__(self, state: object) -> None:
        self.values = state


@dataclass
class Scan:
    """The full names that pickles ask for, and their largest whole number, which may be a size."""

    names: set[str] = field(default_factory=set)
    largest_number: int = 0


def is_zip(path: Path) -> bool:
    """Whether a file has the form that torch writes since 1.6; FormatError when it has neither form."""
    with path.open("rb") as file:
        start = file.read(len(OLD_MAGIC))
    if start.startswith(ZIP_MAGIC):
        return True
    if start != OLD_MAGIC:
        raise FormatError("it is no file that torch.save wrote, or only a piece of one")
    return False


def stand_ins(path: Path) -> list[tuple[type[Stub], str]]:
    """Stubs for all names that a file asks for, as `torch.serialization.safe_globals` takes them.

    FormatError lists those that are refused.
    """
    names = sorted(scan(path).names)
    refused = [name for name in names if _is_refused(name)]
    if refused:
        raise FormatError(
            f"it asks for {', '.join(refused[:10])}, which has no place in a checkpoint and may run code; "
            "the file is refused"
        )
    return [
        (Bag if name in _BAGS else Stub, name)
        for name in names
        if name not in _TORCHS_OWN and name.partition(".")[0] != "torch"
    ]


def _is_refused(name: str) -> bool:
    """Whether a name, by its place in Python 3, is neither foreign nor known to be harmless."""
    top = name.partition(".")[0]
    known = top in sys.stdlib_module_names or top in ("builtins", "numpy")
    return known and name not in _TORCHS_OWN | _BAGS | _STUBBED


def scan(path: Path) -> Scan:
    """What is in the pickles of a file of torch.save; FormatError when it is none, or more than one zip."""
    found = Scan()
    if not is_zip(path):
        with path.open("rb") as file:
            for number in range(_OLD_PICKLES):
                _scan_pickle(file, found)
                if number == 0:
                    found.largest_number = 0  # the magic number is none of a size
        return found
    check_directory(path)
    with zipfile.ZipFile(path) as archive:
        content_record(archive)
    # As torch itself finds it, not as zipfile does: what is scanned must be what is unpickled.
    _scan_pickle(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"), found)
    return found


def check_directory(path: Path) -> None:
    """FormatError unless the list of members of a zip stands where its last bytes say, right before them.

    Python and torch look for it by different ways; a file with two lists would show each of them another one.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _LARGEST_END))
        tail = file.read()
    end, locator, record = tail[-22:], tail[-42:-22], tail[-_LARGEST_END:-42]
    if len(end) < 22 or end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise FormatError("it has no list of members at its end, so a piece of it is missing")
    length, offset = struct.unpack("<LL", end[12:20])
    begin = size - 22
    if locator[:4] == b"PK\6\7":
        begin = size - _LARGEST_END
        if record[:4] != b"PK\6\6" or struct.unpack("<Q", locator[8:16])[0] != begin:
            raise FormatError(_TWO_LISTS)
        length, offset = struct.unpack("<QQ", record[40:56])
    if offset + length != begin:
        raise FormatError(_TWO_LISTS)


def content_record(archive: zipfile.ZipFile) -> str:
    """Name of the one pickle in a zip of torch; FormatError when it is another kind of zip."""
    members = archive.infolist()
    found = [member for member in members if member.filename.rpartition("/")[2] == "data.pkl"]
    if len(found) != 1 or any("/constants.pkl" in member.filename for member in members):
        raise FormatError("it is a zip file, but not one that torch.save wrote")
    # torch never packs its records; a mapped file would give the packed bytes as numbers.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise FormatError("its records are compressed, which torch.save never does")
    if found[0].file_size > _LARGEST_PICKLE:
        raise FormatError(f"its pickle has {found[0].file_size} bytes, without the tensors; that is not credible")
    return found[0].filename


def _scan_pickle(pickle: IO[bytes] | bytes, found: Scan) -> None:
    """Add what is in one pickle, which is read to its end; other ways to name a global are refused."""
    for opcode, argument, _position in pickletools.genops(pickle):
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise FormatError(f"its pickle uses {opcode.name}, which torch.save never writes; it is refused")
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            # torch.save gives a few names as Python 2 had them: subprocess.Popen becomes commands.Popen.
            found.names.add(".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))))
        elif isinstance(argument, int) and "PUT" not in opcode.name and "GET" not in opcode.name:
            found.largest_number = max(found.largest_number, argument)
