"""Damaged corpora of every kind: each is refused at once, with the expected and the actual number."""

import os
import time
from pathlib import Path

import pytest

from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.errors import DataError
from tests.data.damages import (
    BIN,
    BIN_DAMAGES,
    DOCUMENTS,
    FACTS,
    IDX,
    IDX_DAMAGES,
    IDX_SIZE,
    JSON_DAMAGES,
    LENGTHS,
    POINTERS,
)
from tests.data.index_files import index_bytes, number_bytes, read_files, write_files

TYPE_AT, BOUNDARIES_AT = 17, 106
DAMAGES = {
    **{name: ("idx", *rest) for name, rest in IDX_DAMAGES.items()},
    **{name: ("bin", *rest) for name, rest in BIN_DAMAGES.items()},
    **{name: ("json", *rest) for name, rest in JSON_DAMAGES.items()},
}


@pytest.fixture
def prefix(tmp_path):
    return write_files(tmp_path / "corpus", DOCUMENTS)


def assert_refused(prefix, told):
    started = time.process_time()
    with pytest.raises(DataError) as caught:
        Corpus.open(prefix)
    assert time.process_time() - started < 1
    message = str(caught.value)
    assert str(prefix) in message
    assert [part for part in told if part not in message] == [], message


def test_the_undamaged_corpus_is_sound(prefix):
    assert (Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()) == (IDX, BIN)
    assert read_files(prefix) == ("H", DOCUMENTS)
    Path(f"{prefix}.json").write_text(FACTS % (4, 6, 13))
    assert Corpus.open(prefix).facts.largest_id == 17


def test_there_are_sixty_kinds_of_damage_and_no_two_alike():
    assert len({(ending, content) for ending, content, _ in DAMAGES.values()}) == len(DAMAGES) >= 60


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_corpus_is_refused_within_a_second(prefix, damage):
    ending, content, told = DAMAGES[damage]
    Path(f"{prefix}.{ending}").write_bytes(content)
    assert_refused(prefix, told)


# Files that are none


def make_directory(path):
    path.mkdir()


def make_dangling_link(path):
    path.symlink_to("nowhere")


def make_loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("ending", ["bin", "idx", "json"])
@pytest.mark.parametrize("make", [make_directory, os.mkfifo, make_dangling_link, make_loop])
def test_what_is_no_plain_file_is_refused_and_never_waited_for(prefix, make, ending):
    path = Path(f"{prefix}.{ending}")
    path.unlink(missing_ok=True)
    make(path)
    assert_refused(prefix, [f"corpus.{ending}"])


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_missing_file_is_named_with_the_way_out(prefix, ending):
    Path(f"{prefix}.{ending}").unlink()
    assert_refused(prefix, [f"corpus.{ending}: no such file; make it with", "preprocess"])


@pytest.mark.parametrize("name", ["no/such/folder", "corpus.idx/inside", "x" * 300, "zero\0byte"])
def test_impossible_prefix_is_refused(prefix, name):
    assert_refused(prefix.with_name("corpus").parent / name, [])


@pytest.mark.parametrize("ending", ["bin", "idx", "json"])
def test_unreadable_file_is_refused(prefix, ending):
    path = Path(f"{prefix}.{ending}")
    path.touch()
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert_refused(prefix, [f"corpus.{ending}: cannot be read"])


# Each byte of the index


def test_every_byte_of_the_index_counts_or_changes_nothing_but_where_documents_begin(prefix):
    """What the format cannot know: int16 for uint16, alike below 2**15, and a boundary that stays in order."""
    kept = set()
    path = Path(f"{prefix}.idx")
    for offset in range(IDX_SIZE):
        flipped = {IDX[offset] ^ (1 << bit) for bit in range(8)}
        for value in range(256) if offset == TYPE_AT else flipped | {0, 255}:
            path.write_bytes(IDX[:offset] + bytes([value]) + IDX[offset + 1 :])
            try:
                corpus = Corpus.open(prefix)
            except DataError:
                continue
            assert corpus.tokens.tolist() == list(range(5, 18))
            assert corpus.lengths.tolist() == LENGTHS
            assert corpus.pointers.tolist() == POINTERS
            if value != IDX[offset]:
                kept.add((offset, value))
    # Boundaries 0, 2, 3, 3, 6: the 2 may be a 0 or a 3, the first 3 a 2.
    assert kept == {(TYPE_AT, 3), (BOUNDARIES_AT + 8, 0), (BOUNDARIES_AT + 8, 3), (BOUNDARIES_AT + 16, 2)}


def test_index_that_says_something_else_after_the_first_block_is_refused(tmp_path):
    """Many blocks of sentences and documents, with one wrong number at the edges of the blocks."""
    num, block = 200_000, 1 << 16
    lengths, boundaries = [2] * num, list(range(num + 1))
    good = index_bytes(lengths, boundaries)
    (tmp_path / "large.bin").write_bytes(bytes(4 * num))
    for place in (block - 1, block, block + 1, 2 * block, 3 * block - 1, 3 * block, num - 2):
        for name, at, size, letter in (("must begin", 34 + 4 * num, 8, "q"), ("tokens, not", 34, 4, "i")):
            offset = at + size * place
            content = good[:offset] + number_bytes(letter, [-1]) + good[offset + size :]
            (tmp_path / "large.idx").write_bytes(content)
            assert_refused(tmp_path / "large", [f"sentence {place} ", name])
        offset = 34 + 12 * num + 8 * place
        content = good[:offset] + number_bytes("q", [place - 2]) + good[offset + 8 :]
        (tmp_path / "large.idx").write_bytes(content)
        assert_refused(tmp_path / "large", [f"boundary {place} is {place - 2} after {place - 1}"])
    # Lengths and pointers of the first block agree with each other, but not with the size of the .bin.
    pointers = [0, *range(4 * num, 8 * num, 4)][:block] + list(range(4 * block, 4 * num, 4))
    long = index_bytes([2 * num, *lengths[1:]], boundaries, pointers=pointers)
    (tmp_path / "large.idx").write_bytes(long)
    told = f"sentence {block - 1} of large.idx ends at byte {4 * (num + block - 1)}, the file has {4 * num} bytes"
    assert_refused(tmp_path / "large", [told])
    (tmp_path / "large.idx").write_bytes(good)
    assert Corpus.open(tmp_path / "large").num_documents == num
