import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import time
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from megatron_bert_tp.data.samples.sample_index import key_of
from megatron_bert_tp.data.samples.spans import SPAN_COLUMNS, build_spans
from megatron_bert_tp.data.samples.splits import part_of
from megatron_bert_tp.errors import DataError
from tests.data.corpora import numbered_documents, random_shape
from tests.data.index_processes import (
    RULE,
    SPLIT,
    build_until,
    columns_of,
    open_spans,
    open_together,
    open_with_little_room,
)

FILES = ["facts.json", *(f"{name}.npy" for name in SPAN_COLUMNS)]
PROCESSES = multiprocessing.get_context("spawn")


@pytest.fixture
def corpus(write_corpus):
    return write_corpus(numbered_documents(random_shape(80)))


def expected(corpus):
    part = part_of(corpus.num_documents, SPLIT, "training")
    return columns_of(build_spans(corpus, part, sequence_length=32, short_share=0.1, seed=7))


def folders_of(corpus):
    return sorted(path for path in Path(f"{corpus.prefix}.samples").iterdir() if path.is_dir())


# One process


def test_the_index_is_built_once_and_then_mapped(corpus):
    spans, said = open_spans(corpus)
    assert columns_of(spans) == expected(corpus)
    assert ["is built in" in line for line in said] == [True, False]
    assert f": {len(spans)} samples in " in said[1]
    again, said = open_spans(corpus)
    assert said == []
    assert columns_of(again) == expected(corpus)
    for each in (spans, again):
        for name in SPAN_COLUMNS:
            array = getattr(each, name)
            assert not array.flags.owndata
            assert not array.flags.writeable
    (folder,) = folders_of(corpus)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_an_index_can_be_kept_elsewhere(corpus, tmp_path):
    spans, _ = open_spans(corpus, folder=tmp_path / "a" / "b")
    assert spans.folder.parent == tmp_path / "a" / "b"
    assert not Path(f"{corpus.prefix}.samples").exists()
    assert open_spans(corpus, folder=tmp_path / "a" / "b")[1] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"part": "validation"},
        {"split": (79.0, 21.0, 0.0)},
        {"rule": replace(RULE, sequence_length=33)},
        {"rule": replace(RULE, short_share=0.2)},
        {"rule": replace(RULE, seed=8)},
        {"rule": replace(RULE, pairs="sop")},
        {"rule": replace(RULE, pairs="none")},
    ],
)
def test_other_settings_have_an_index_of_their_own(corpus, changes):
    first, _ = open_spans(corpus)
    other, said = open_spans(corpus, **changes)
    assert other.folder != first.folder
    assert "is built in" in said[0]
    assert open_spans(corpus)[1] == open_spans(corpus, **changes)[1] == []


def test_another_corpus_under_the_same_name_has_an_index_of_its_own(write_corpus):
    shape = random_shape(80)
    old, _ = open_spans(write_corpus(numbered_documents(shape)))
    shape[3][0] += 1
    changed = write_corpus(numbered_documents(shape))
    new, said = open_spans(changed)
    assert "is built in" in said[0]
    assert new.folder != old.folder
    assert columns_of(new) == expected(changed)


def test_a_part_without_samples_is_refused_and_leaves_nothing(write_corpus):
    corpus = write_corpus(numbered_documents([[3]] * 50))
    with pytest.raises(DataError, match="of the 40 documents of this part 0 have so many"):
        open_spans(corpus)
    assert folders_of(corpus) == []


def test_mapped_spans_are_pickled_as_their_folder(corpus):
    spans, _ = open_spans(corpus)
    pickled = pickle.dumps(spans)
    assert len(pickled) < 1000
    assert columns_of(pickle.loads(pickled)) == columns_of(spans)
    in_memory = build_spans(corpus, np.arange(80), sequence_length=32, short_share=0.1, seed=7)
    assert columns_of(pickle.loads(pickle.dumps(in_memory))) == columns_of(in_memory)


# Damage


def assert_it_is_told_and_mended(corpus, told=""):
    spans, said = open_spans(corpus)
    assert columns_of(spans) == expected(corpus)
    assert len(said) == 3
    assert f"in {spans.folder} is not used: " in said[0]
    assert told in said[0]
    assert "it is built again" in said[0]
    assert open_spans(corpus)[1] == []


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_told_and_mended(corpus, name):
    path = open_spans(corpus)[0].folder / name
    size = path.stat().st_size
    for place in np.unique(np.linspace(0, size - 1, 12).astype(int)).tolist():
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        assert_it_is_told_and_mended(corpus)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "missing", "a folder"])
def test_a_file_that_is_not_whole_is_told_and_mended(corpus, name, damage):
    path = open_spans(corpus)[0].folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"cut": content[:-2], "longer": content + b" x", "empty": b""}[damage])
    assert_it_is_told_and_mended(corpus)


def test_an_index_of_another_corpus_is_told_and_mended(write_corpus):
    corpus, other = (write_corpus(numbered_documents(random_shape(80, seed)), f"c{seed}") for seed in (1, 2))
    own, foreign = open_spans(corpus)[0].folder, open_spans(other)[0].folder
    shutil.rmtree(own)
    shutil.copytree(foreign, own)
    assert_it_is_told_and_mended(corpus, "another corpus or with other settings")


@pytest.mark.parametrize("facts", ["[]", "{}", "null", "[" * 100_000, '{"made_from": 1}', "\0"])
def test_facts_that_are_none_are_told_and_mended(corpus, facts):
    (open_spans(corpus)[0].folder / "facts.json").write_text(facts)
    assert_it_is_told_and_mended(corpus)


def test_arrays_of_other_lengths_are_told_although_their_hashes_fit(corpus):
    """What a changed program might have written."""
    path = open_spans(corpus)[0].folder / "facts.json"
    facts = json.loads(path.read_text())
    facts["lengths"]["first"] += 1
    path.write_text(json.dumps(facts))
    assert_it_is_told_and_mended(corpus, "lengths: first has")


def test_the_name_of_a_folder_is_the_hash_of_what_it_is_made_from(corpus):
    folder = open_spans(corpus)[0].folder
    made_from = json.loads((folder / "facts.json").read_text())["made_from"]
    assert made_from["corpus"] == corpus.digest
    assert folder.name == key_of(made_from)
    assert sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest().startswith(folder.name)


# Folders that cannot be written


def test_where_nothing_can_be_written_the_spans_are_built_in_memory_and_that_is_said(corpus):
    Path(f"{corpus.prefix}.samples").write_text("a file stands where the folder belongs")
    spans, said = open_spans(corpus)
    assert spans.folder is None
    assert columns_of(spans) == expected(corpus)
    assert len(said) == 1
    assert "every process builds it in its own memory: set run.index_cache" in said[0]


def test_a_full_disk_leaves_nothing_and_is_said(corpus):
    columns, folder, said = in_processes(open_with_little_room, [(corpus.prefix,)])[0]
    assert columns == expected(corpus)
    assert folder is None
    assert "its own memory" in said[-1]
    assert "File too large" in said[-1]
    assert folders_of(corpus) == []


# Several processes


@contextmanager
def running(function, arguments):
    """Processes that are gone afterwards, also where the test fails."""
    started = [PROCESSES.Process(target=function, args=given) for given in arguments]
    try:
        for process in started:
            process.start()
        yield started
    finally:
        for process in started:
            if process.pid is not None:
                process.kill()
                process.join()


def in_processes(function, arguments):
    """What each of the processes puts into the queue."""
    answers = PROCESSES.Queue()
    with running(function, [(*given, answers) for given in arguments]) as started:
        results = [answers.get(timeout=120) for _ in started]
        for process in started:
            process.join()
            assert process.exitcode == 0
    return results


def open_in_four_processes(corpus):
    """Spans of each process, and what it said; they begin together."""
    shared = (PROCESSES.Barrier(4), PROCESSES.Value("i", 0))
    return in_processes(open_together, [(corpus.prefix, *shared)] * 4)


def test_of_four_processes_one_builds_and_the_others_wait(corpus):
    results = open_in_four_processes(corpus)
    assert all(columns == expected(corpus) for columns, _ in results)
    said = sorted((lines for _, lines in results), key=len)
    assert ["is built in" in lines[0] for lines in said] == [False, False, False, True]
    for lines in said[:3]:
        assert len(lines) == 1
        assert "is built by" in lines[0]
        assert re.search(r"waiting, for [45]\d s at most", lines[0])


def test_of_four_processes_one_mends_a_damaged_index(corpus):
    path = open_spans(corpus)[0].folder / "target.npy"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    results = open_in_four_processes(corpus)
    assert all(columns == expected(corpus) for columns, _ in results)
    lines = [line for _, said in results for line in said]
    assert sum("is not used" in line for line in lines) == 1
    assert sum("is built in" in line for line in lines) == 1


def test_waiting_ends_in_an_error_that_names_the_builder_and_its_lock(corpus):
    is_building, go_on = PROCESSES.Event(), PROCESSES.Event()
    with running(build_until, [(corpus.prefix, is_building, go_on)]) as (builder,):
        assert is_building.wait(60)
        said = []
        name = rf"process {builder.pid} of {socket.gethostname()}"
        with pytest.raises(DataError, match=rf"awaited for 0.5 s, but {name} still builds it.*\.lock: end that"):
            open_spans(corpus, wait=0.5, say=said.append)
        assert [name in line for line in said] == [True]
        go_on.set()
        builder.join()
    spans, said = open_spans(corpus)
    assert said == []
    assert columns_of(spans) == expected(corpus)


def test_the_next_process_builds_after_a_killed_one_and_removes_what_it_left(corpus):
    is_building = PROCESSES.Event()
    with running(build_until, [(corpus.prefix, is_building, None)]) as (builder,):
        builder.join()
    assert builder.exitcode == -signal.SIGKILL
    (left,) = folders_of(corpus)
    assert left.name.endswith(f"{socket.gethostname()}-{builder.pid}")
    spans, said = open_spans(corpus)
    assert "is built in" in said[0]
    assert folders_of(corpus) == [spans.folder]


def test_what_another_host_is_building_stays_until_it_is_abandoned(corpus):
    folder = open_spans(corpus)[0].folder
    shutil.rmtree(folder)
    foreign = folder.with_name(f"{folder.name}.building-elsewhere-4711")
    foreign.mkdir()
    open_spans(corpus)
    assert foreign.exists()
    os.utime(foreign, (time.time() - 3600,) * 2)
    shutil.rmtree(folder)
    open_spans(corpus)
    assert not foreign.exists()
