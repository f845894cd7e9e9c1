"""Zip files from strangers: checked before anything is taken out, and counted while it is."""

import io
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from megatron_bert_tp.checkpoint.durable import readable
from megatron_bert_tp.errors import FormatError

LARGEST_COUNT = 4096
"""Members."""
LARGEST_SIZE = 256 * 10**9
"""Bytes of all members, unpacked."""
LARGEST_RATIO = 100
"""Unpacked bytes for each packed one; weights come to less than 2."""
_CREDIBLE = 2**20  # bytes; below, any ratio is harmless
_LARGEST_READ = 4 * 2**20  # bytes; zipfile reads the list of members at once, before it can be counted
_CHUNK = 2**20
_KINDS = (0, stat.S_IFREG, stat.S_IFDIR)
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError)


def holds(path: Path, name: str) -> bool:
    """Whether a zip has a file of this name in any folder; nothing else of it is looked at."""
    with _opened(path) as archive:
        return any(member.rpartition("/")[2] == name for member in archive.namelist())


def member_names(path: Path) -> list[str]:
    """Files of a zip; FormatError when any member is unsafe or not credible, whether or not it would be used."""
    with _opened(path) as archive:
        members = archive.infolist()
        if len(members) > LARGEST_COUNT:
            raise FormatError(f"{path}: has {len(members)} members; at most {LARGEST_COUNT} are credible")
        problems = _problems(members, path.stat().st_size)
        if problems:
            raise FormatError("\n".join([f"{path}: this zip file is refused:", *problems[:10]]))
        return [member.filename for member in members if not member.is_dir()]


def read_member(path: Path, name: str, *, largest: int) -> bytes:
    """Content of a small member; FormatError beyond ``largest`` bytes."""
    with _opened(path) as archive, archive.open(name) as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise FormatError(f"{path}: {name} has more than the {readable(largest)} that are credible")
    return content


def ends_of_member(path: Path, name: str, *, num_bytes: int) -> tuple[bytes, bytes]:
    """The first and the last bytes of a member, which is read through; FormatError when its checksum is wrong."""
    with _opened(path) as archive, archive.open(name) as stream:
        first = last = stream.read(num_bytes)
        while chunk := stream.read(_CHUNK):
            last = (last + chunk)[-num_bytes:]
    return first, last


def extract_member(path: Path, name: str, target: Path) -> None:
    """Write a member to the new file ``target``; FormatError as soon as it is longer than the zip says."""
    with _opened(path) as archive, archive.open(name) as stream, target.open("xb") as file:
        size, promised = 0, archive.getinfo(name).file_size
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            if size > promised:
                break
            file.write(chunk)
    if size != promised:
        raise FormatError(f"{path}: {name} has not the {readable(promised)} that the zip says; it is damaged")


class _ShortReads(io.FileIO):
    """A file that refuses to be read in one large piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_READ:
            raise zipfile.BadZipFile(f"its list of members has {readable(size)}")
        content = super().read(_LARGEST_READ + 1 if size is None or size < 0 else size)
        return content or b""


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """An open zip; whatever its content makes the standard library raise becomes a FormatError."""
    try:
        with _ShortReads(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except UNREADABLE as error:
        raise FormatError(f"{path}: cannot be unpacked ({error}); the zip is damaged, fetch it again") from error


def _problems(members: list[zipfile.ZipInfo], packed: int) -> list[str]:
    """What makes a zip unsafe, one line each."""
    names = [member.filename for member in members]
    total = sum(member.file_size for member in members)
    lines = [f"  {name!r} is in it twice" for name in sorted({name for name in names if names.count(name) > 1})]
    lines += [f"  {name!r} leads out of the folder" for name in names if not _is_inside(name)]
    lines += [f"  {member.filename!r} is a link or a device" for member in members if not _is_plain(member)]
    lines += [f"  {member.filename!r} {_bomb(member)}" for member in members if _bomb(member)]
    if total > max(_CREDIBLE, LARGEST_RATIO * packed):
        lines.append(f"  {readable(packed)} become {readable(total)}, more than {LARGEST_RATIO} times as much")
    if total > LARGEST_SIZE:
        lines.append(f"  it unpacks to {readable(total)}; at most {readable(LARGEST_SIZE)} are credible")
    return lines


def _is_inside(name: str) -> bool:
    windows = "\\" in name or ":" in name
    return bool(name) and not windows and not name.startswith("/") and ".." not in PurePosixPath(name).parts


def _is_plain(member: zipfile.ZipInfo) -> bool:
    return stat.S_IFMT(member.external_attr >> 16) in _KINDS


def _bomb(member: zipfile.ZipInfo) -> str:
    """How a member is packed beyond belief; empty when it is not."""
    if member.file_size <= max(_CREDIBLE, LARGEST_RATIO * member.compress_size):
        return ""
    return f"unpacks from {readable(member.compress_size)} to {readable(member.file_size)}"
