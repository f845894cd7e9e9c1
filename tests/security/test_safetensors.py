"""safetensors files that claim what they do not hold are refused before memory is taken for it."""

import json
import struct
import time
from pathlib import Path

import pytest

from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.stored_tensors import open_tensors

MEBIBYTE = 2**20


def peak_memory() -> int:
    """Bytes that this process has held at most since the last call of `forget_peak`."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def tensor(begin: int, end: int, *, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def framed(header: bytes, data: bytes = b"", *, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + data


def file_of(tensors: dict[str, object], num_bytes: int = 16) -> bytes:
    return framed(json.dumps(tensors).encode(), bytes(num_bytes))


HOSTILE = {
    "nothing": b"",
    "a header of 2**63 bytes": framed(b"{}", claimed=2**63),
    "a header of all bytes": framed(b"{}", claimed=2**64 - 1),
    "a header of 200 MB that is not there": framed(b"{}", claimed=200 * MEBIBYTE),
    "a header of 120 MB": framed(b"{" + b" " * 120 * MEBIBYTE + b"}"),
    "no JSON": framed(b"pickle me"),
    "a list": framed(b"[]"),
    "a hundred thousand levels": framed(b'{"a":' + b"[" * 100_000),
    "overlapping tensors": file_of({"a": tensor(0, 8), "b": tensor(4, 12)}, 12),
    "the same bytes twice": file_of({"a": tensor(0, 8), "b": tensor(0, 8)}, 8),
    "a gap": file_of({"a": tensor(0, 8), "b": tensor(12, 20)}, 20),
    "an end beyond the file": file_of({"a": tensor(0, 2**40, shape=[2**38])}),
    "an end before the begin": file_of({"a": tensor(8, 0)}),
    "bytes that no tensor has": file_of({"a": tensor(0, 8)}, 16),
    "a shape that is larger than its bytes": file_of({"a": tensor(0, 8, shape=[2**40])}, 8),
    "a shape whose product overflows": file_of({"a": tensor(0, 8, shape=[2**62, 2**62])}, 8),
    "a negative shape": file_of({"a": tensor(0, 8, shape=[-2])}, 8),
    "another format than its bytes": file_of({"a": tensor(0, 8, dtype="F64")}, 8),
    "an unknown format": file_of({"a": tensor(0, 8, dtype="PICKLE")}, 8),
    "no format": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8),
    "numbers that are texts": file_of({"a": {"dtype": "F32", "shape": ["2"], "data_offsets": ["0", "8"]}}, 8),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_claims_what_it_does_not_hold_is_refused_before_memory_is_taken(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind])
    forget_peak()
    before, started = peak_memory(), time.process_time()
    with pytest.raises(FormatError, match=r"model\.safetensors: cannot be read"):
        open_tensors([path])
    assert time.process_time() - started < 1
    assert peak_memory() - before < 64 * MEBIBYTE


def test_a_file_that_holds_what_it_says_is_opened(tmp_path):
    """Guards the tests above: it is the claim that is refused."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"a": tensor(0, 8), "b": tensor(8, 16)}))
    assert {name: stored.shape for name, stored in open_tensors([path]).items()} == {"a": (2,), "b": (2,)}
