"""Ways to damage a small corpus: name to (contents of the damaged file, what the message must hold)."""

import struct
import zlib

from tests.data.index_files import index_bytes, number_bytes

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [], [[11, 12], [13], [14, 15, 16, 17]]]
LENGTHS, POINTERS, BOUNDARIES = [3, 1, 2, 2, 1, 4], [0, 6, 8, 12, 16, 18], [0, 2, 3, 3, 6]
IDX, BIN = index_bytes(LENGTHS, BOUNDARIES), number_bytes("H", range(5, 18))
IDX_SIZE, BIN_SIZE = 146, 26


def index(lengths=LENGTHS, boundaries=BOUNDARIES, **changes):
    return index_bytes(lengths, boundaries, **changes)


def with_bytes(offset, content):
    return IDX[:offset] + content + IDX[offset + len(content) :]


def header(*, version=1, code=8, sentences=6, boundaries=5):
    return with_bytes(9, struct.pack("<QBQQ", version, code, sentences, boundaries))


def altered(numbers, place, value):
    return [*numbers[:place], value, *numbers[place + 1 :]]


IDX_DAMAGES = {
    # cut short or longer
    **{f"idx cut to {n}": (IDX[:n], ["at least 34 bytes", f"has {n};"]) for n in (0, 1, 8, 9, 17, 18, 26, 33)},
    **{
        f"idx cut to {n}": (IDX[:n], ["146 bytes", f"has {n};"])
        for n in (34, 37, 38, 57, 58, 65, 105, 106, 138, 145)
    },
    **{f"idx and {n} bytes": (IDX + bytes(n), ["146 bytes", f"has {146 + n};"]) for n in (1, 4, 8, 12, 5000)},
    "multimodal idx": (IDX + bytes(6), ["146 bytes", "has 152:", "multimodal"]),
    # another kind of file
    "all zero": (bytes(IDX_SIZE), ["not an index"]),
    "first byte of the magic": (with_bytes(0, b"X"), ["XMIDIDX", "not an index"]),
    "last byte of the magic": (with_bytes(8, b"X"), ["x00X", "not an index"]),
    "older index of Megatron": (b"TNTIDX\0\0" + IDX[8:], ["TNTIDX", "not an index"]),
    "text": (b"It was a bright cold day in April, and the clocks were striking.", ["It was a ", "not an index"]),
    "compressed idx": (zlib.compress(IDX * 9), ["not an index"]),
    "the .bin as .idx": (BIN * 3, ["not an index"]),
    # header
    **{f"version {n}": (header(version=n), [f"version {n} ", "version 1"]) for n in (0, 2, 2**56, 2**64 - 1)},
    **{f"type {n}": (header(code=n), ["8 uint16", f"has {n}:"]) for n in (0, 6, 7, 9, 107, 255)},
    **{
        f"type {n}, other width": (header(code=n), [f"expects {size} bytes", "has 26"])
        for n, size in ((1, 22), (2, 22), (4, 34), (5, 50))
    },
    "one sentence less": (header(sentences=5), ["5 sentences", "134 bytes", "has 146"]),
    "one sentence more": (header(sentences=7), ["7 sentences", "158 bytes", "has 146"]),
    **{f"{n} sentences": (header(sentences=n), [str(34 + 12 * n + 40), "has 146"]) for n in (2**31, 2**60, 2**63)},
    "2**64 - 1 sentences": (header(sentences=2**64 - 1), [str(34 + 12 * (2**64 - 1) + 40), "has 146"]),
    "one boundary less": (header(boundaries=4), ["4 document", "138 bytes", "has 146"]),
    "one boundary more": (header(boundaries=6), ["6 document", "154 bytes", "has 146"]),
    **{
        f"{n} boundaries": (header(boundaries=n), [str(106 + 8 * n), "has 146"])
        for n in (0, 2**61, 2**63, 2**64 - 1)
    },
    # a size that wraps around in 64 bits to the right one: 12 * 2**62 = 3 * 2**64
    "count that wraps": (header(sentences=6 + 2**62), [str(146 + 12 * 2**62), "has 146"]),
    "counts traded": (header(sentences=4, boundaries=8), ["expects", "has 26"]),
    "counts traded the other way": (header(sentences=8, boundaries=2), ["expects", "has 26"]),
    # empty
    "nothing in it": (index([], []), ["empty corpus (0 sentences, 0 documents, 26 bytes"]),
    "no sentence": (index([], [0, 0]), ["empty corpus (0 sentences, 1 documents"]),
    "no document": (index(boundaries=[0]), ["empty corpus (6 sentences, 0 documents"]),
    "no boundary": (index(boundaries=[]), ["empty corpus (6 sentences, 0 documents"]),
    # of another corpus
    "shorter corpus": (index([3, 1, 2], [0, 3]), ["expects 12 bytes", "has 26"]),
    "longer corpus": (index([9, 9, 9], [0, 3]), ["expects 54 bytes", "has 26"]),
    "corpus of an equal idx": (index([2, 2, 2, 2, 2, 5]), ["expects 30 bytes", "has 26"]),
    "four bytes a token": (index(letter="i"), ["expects 52 bytes", "has 26"]),
    "big endian": (IDX[:34] + struct.pack(">6i6q5q", *LENGTHS, *POINTERS, *BOUNDARIES), ["has 26"]),
    # lengths, with the pointers left as they are
    **{
        f"length {place} is {value}": (index(altered(LENGTHS, place, value), pointers=POINTERS), told)
        for place, start in ((0, 6), (2, 12), (3, 16))
        for value, told in (
            (0, [f"sentence {place} has 0 tokens", "1 or more"]),
            (-1, [f"sentence {place} has -1 tokens", "1 or more"]),
            (-(2**31), [f"sentence {place} has -2147483648 tokens", "1 or more"]),
            (7, [f"sentence {place + 1} must begin at byte {start + 2 * (7 - LENGTHS[place])}", f"says {start}"]),
            (2**31 - 1, [f"at byte {start + 2 * (2**31 - 1 - LENGTHS[place])}", f"says {start}"]),
        )
    },
    **{
        f"last length is {value}": (
            index(altered(LENGTHS, 5, value), pointers=POINTERS),
            [f"{size} bytes", "has 26"],
        )
        for value, size in ((0, 18), (-1, 16), (3, 24), (5, 28), (2**31 - 1, 18 + 2 * (2**31 - 1)))
    },
    "two lengths changed": (index([2, 2, 2, 2, 1, 4], pointers=POINTERS), ["sentence 1", "byte 4", "says 6"]),
    # pointers, with the lengths left as they are
    **{
        f"pointer {place} is {value}": (
            index(pointers=altered(POINTERS, place, value)),
            [f"sentence {place} must begin at byte {POINTERS[place]},", f"says {value};"],
        )
        for place in (0, 2, 4)
        for value in (-2, 7, 26, 2**40, 2**63 - 1, -(2**63))
    },
    **{
        f"last pointer is {value}": (index(pointers=altered(POINTERS, 5, value)), [f"{value + 8} bytes", "has 26"])
        for value in (-8, 16, 20, 2**63 - 1, -(2**63))
    },
    "pointers out of order": (index(pointers=[0, 8, 6, 12, 16, 18]), ["sentence 1", "byte 6", "says 8"]),
    "pointers from 2 on": (index(pointers=[2, 8, 10, 14, 18, 18]), ["sentence 0", "byte 0", "says 2"]),
    "a gap": (index([3, 1, 2, 2, 1, 3], pointers=[0, 6, 8, 12, 16, 20]), ["sentence 5", "byte 18", "says 20"]),
    "sentences twice": (index(pointers=[0, 6, 8, 8, 16, 18]), ["sentence 3", "byte 12", "says 8"]),
    # documents
    **{
        f"first boundary is {n}": (index(boundaries=[n, 2, 3, 3, 6]), ["from 0 to 6", f"first is {n};"])
        for n in (1, 2, -1, 2**63 - 1)
    },
    **{
        f"boundary 2 is {n}": (index(boundaries=[0, 2, n, 3, 6]), ["from 0 to 6", f"2 is {n} after 2;"])
        for n in (1, 0, -1, -(2**63))
    },
    **{
        f"boundary 2 is {n}": (index(boundaries=[0, 2, n, 3, 6]), ["from 0 to 6", f"3 is 3 after {n};"])
        for n in (4, 7, 2**63 - 1)
    },
    **{
        f"last boundary is {n}": (index(boundaries=[0, 2, 3, 3, n]), ["from 0 to 6", f"last is {n};"])
        for n in (3, 5, 7, 2**62)
    },
    "last boundary is 0": (index(boundaries=[0, 2, 3, 3, 0]), ["from 0 to 6", "boundary 4 is 0 after 3"]),
    "boundaries in bytes": (index(boundaries=[0, 8, 12, 12, 26]), ["from 0 to 6", "last is 26"]),
}

BIN_DAMAGES = {
    **{f"bin cut to {n}": (BIN[:n], ["expects 26 bytes", f"has {n}:"]) for n in (1, 2, 12, 13, 24, 25)},
    **{
        f"bin and {n} bytes": (BIN + bytes(n), ["expects 26 bytes", f"has {26 + n}:"]) for n in (1, 2, 26, 100_000)
    },
    "empty bin": (b"", ["empty corpus (6 sentences, 4 documents, 0 bytes"]),
    "the .idx as .bin": (IDX, ["expects 26 bytes", "has 146:"]),
}
FACTS = (
    '{"documents": %d, "sentences": %d, "tokens": %d, "largest_id": 17, "bin_sha256": "", "vocab_size": 200, '
    '"tokenizer_sha256": "", "lowercase": true}'
)
JSON_DAMAGES = {
    "empty json": (b"", ["not JSON"]),
    "no json": (b"documents: 4", ["not JSON"]),
    "cut json": ((FACTS % (4, 6, 13))[:-20].encode(), ["not JSON"]),
    "json in UTF-16": ((FACTS % (4, 6, 13)).encode("utf-16"), ["not JSON"]),
    "nested json": (b"[" * 100_000, ["not JSON"]),
    "json list": (b"[]", ["the facts of a corpus have the keys"]),
    "json without keys": (b'{"documents": 4}', ["the facts of a corpus have the keys"]),
    "json with a text for a number": (
        (FACTS % (4, 6, 13)).replace("17", '"17"').encode(),
        ["have the keys", "a value of its kind"],
    ),
    "large json": (b" " * (1 << 20) + b"{}", ["at most 1048576 bytes", "has 1048578"]),
    "other documents": ((FACTS % (3, 6, 13)).encode(), ["(3, 6, 13)", "(4, 6, 13)", "different corpora"]),
    "other sentences": ((FACTS % (4, 7, 13)).encode(), ["(4, 7, 13)", "(4, 6, 13)", "different corpora"]),
    "other tokens": ((FACTS % (4, 6, 12)).encode(), ["(4, 6, 12)", "(4, 6, 13)", "different corpora"]),
    "negative documents": ((FACTS % (-4, 6, 13)).encode(), ["(-4, 6, 13)", "(4, 6, 13)"]),
}
