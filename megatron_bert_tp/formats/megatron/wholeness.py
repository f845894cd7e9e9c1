"""Whether a file is one that torch.save wrote, as far as can be told without unpickling it."""

import zipfile
from pathlib import Path

from megatron_bert_tp.checkpoint.durable import check_regular
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.megatron.archive import UNREADABLE, ends_of_member
from megatron_bert_tp.formats.megatron.pickle_globals import (
    OLD_MAGIC,
    ZIP_MAGIC,
    check_directory,
    content_record,
    is_zip,
    scan,
)

_END = 22  # bytes of the last record of a zip


def check_whole(path: Path) -> None:
    """FormatError unless a file has its list of members and its pickle, or the pickles of the old form.

    The tensors are not read.
    """
    check_regular(path, FormatError)
    try:
        if is_zip(path):
            check_directory(path)
            with zipfile.ZipFile(path) as archive:
                archive.read(content_record(archive))
        else:
            scan(path)
    except (*UNREADABLE, FormatError) as error:
        raise FormatError(f"{path}: is no whole file of torch.save ({error}); fetch it again") from error


def check_whole_member(path: Path, name: str) -> None:
    """FormatError unless a member of a zip has its checksum, and begins and ends as files of torch.save do."""
    first, last = ends_of_member(path, name, num_bytes=max(_END, len(OLD_MAGIC)))
    is_new = first.startswith(ZIP_MAGIC) and last[-_END:].startswith(b"PK\5\6")
    if not is_new and not first.startswith(OLD_MAGIC):
        raise FormatError(f"{path}: {name} is no whole file of torch.save; fetch the zip again")
