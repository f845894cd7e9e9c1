"""The demo corpus from a small made-up package, and from a part of the real standard library."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bert_tp.demo.corpus import MAX_REPEATS, build_corpus
from megatron_bert_tp.demo.prose import is_prose, plain, prose_sentences
from megatron_bert_tp.demo.sources import PACKAGES, Source, installed_sources, read_documents
from megatron_bert_tp.errors import DataError

MODULE = '''"""Boats carry goods over the water. They need a harbour at both ends.
Parameters
----------
length : float
    The length of the boat in metres is given here.

Notes
-----
Every boat sinks when it is overloaded. See :func:`~boats.harbour.weigh` for the limits [1]_.

>>> boat = Boat(3)
>>> boat.sail()
The boat sails happily away.
"""

class Boat:
    """A boat floats because it is lighter than water::

        The hull of the boat is code here.

    ======  =====================
    Kind    The meaning of kinds.
    ======  =====================

    Light   The light boats are fast.
    Heavy   The heavy boats are slow.

    A boat has two parts:
    - The first item is a whole sentence.
    - The second item follows at once.

    mast -- The mast holds the sail in the wind.

    keel : wood
        The keel is described below its name.

    .. note:: A ``mast`` is optional on *small* boats.

    .. code-block:: python

        The sail is made of code.

    Args:
        sail: The sail of the boat is described here.

    :param mast: The mast of the boat is described here.
    """

    if True:
        def sail(self):
            """Sail the boat to the next harbour"""
'''
SENTENCES = [
    "Boats carry goods over the water.",
    "They need a harbour at both ends.",
    "Every boat sinks when it is overloaded.",
    "See weigh for the limits.",
    "The first item is a whole sentence.",
    "The second item follows at once.",
    "A mast is optional on small boats.",
    "Sail the boat to the next harbour.",
]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A made-up package of a module, four more with distinct documents, a broken one and tests."""
    root = tmp_path / "boats"
    (root / "tests").mkdir(parents=True)
    (root / "boat.py").write_text(MODULE)
    (root / "tests" / "test_boat.py").write_text(MODULE)
    (root / "broken.py").write_text('"""Not a program at all."""\ndef (')
    (root / "warns.py").write_text('"""One two three four."""\nx = "\\d"\nassert (1, "always")\n')
    for name in "adcb":
        text = " ".join(f"The {word} harbour of {name} is large." for word in ("old", "new", "far", "deep"))
        (root / f"{name}.py").write_text(f'"""{text} This line repeats in all of the files."""')
    return Source("boats", "1.0", root)


def documents(path: Path) -> list[list[str]]:
    return [document.splitlines() for document in path.read_text(encoding="utf-8").split("\n\n")]


def test_prose_is_kept_and_code_prompts_tables_and_parameters_are_dropped(source: Source) -> None:
    assert read_documents(source.root / "boat.py") == [SENTENCES]


def test_source_that_warns_is_read_in_silence(source: Source) -> None:
    assert read_documents(source.root / "warns.py") == [["One two three four."]]


def test_source_that_cannot_be_parsed_is_left_out(source: Source) -> None:
    assert read_documents(source.root / "broken.py") == []


def test_corpus_has_one_sentence_a_line_and_documents_in_the_order_of_paths(
    source: Source, tmp_path: Path
) -> None:
    report = build_corpus(tmp_path / "out" / "corpus.txt", 1, chosen=[source])
    found = documents(report.path)
    assert [d[0] for d in found] == [f"The old harbour of {name} is large." for name in "ab"] + [
        SENTENCES[0],
        "The old harbour of c is large.",
        "The old harbour of d is large.",
    ]
    assert found[2] == SENTENCES
    assert report.path.read_bytes().endswith(b".\n")


def test_sentence_is_repeated_twice_at_most(source: Source, tmp_path: Path) -> None:
    path = build_corpus(tmp_path / "corpus.txt", 1, chosen=[source]).path
    assert path.read_text().count("This line repeats in all of the files.") == MAX_REPEATS == 2


def test_report_tells_the_true_sizes(source: Source, tmp_path: Path) -> None:
    report = build_corpus(tmp_path / "corpus.txt", 1, chosen=[source])
    content = report.path.read_bytes()
    lines = [line for line in content.decode().splitlines() if line]
    assert report.documents == len(documents(report.path)) == 5
    assert report.sentences == len(lines)
    assert report.words == sum(len(line.split()) for line in lines)
    assert (report.num_bytes, report.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_bytes_do_not_depend_on_the_number_of_workers(source: Source, tmp_path: Path) -> None:
    reports = [build_corpus(tmp_path / f"{n}.txt", n, chosen=[source]) for n in (1, 2, 3)]
    assert len({report.path.read_bytes() for report in reports}) == 1


def test_corpus_is_reused_while_sources_and_file_are_unchanged(source: Source, tmp_path: Path) -> None:
    output = tmp_path / "corpus.txt"
    first = build_corpus(output, 1, chosen=[source])
    second = build_corpus(output, 1, chosen=[source])
    assert not first.is_reused
    assert second == replace(first, is_reused=True)
    assert not build_corpus(output, 1, chosen=[replace(source, version="2.0")]).is_reused


def test_damaged_corpus_is_written_anew(source: Source, tmp_path: Path) -> None:
    output = tmp_path / "corpus.txt"
    first = build_corpus(output, 1, chosen=[source])
    output.write_text("damaged")
    assert build_corpus(output, 1, chosen=[source]) == first


@pytest.mark.parametrize("record", ["{", "[]", "{}", json.dumps({"sources": [{"name": "boats"}]})])
def test_unreadable_record_means_that_the_corpus_is_written_anew(
    source: Source, tmp_path: Path, record: str
) -> None:
    output = tmp_path / "corpus.txt"
    first = build_corpus(output, 1, chosen=[source])
    (tmp_path / "corpus.txt.json").write_text(record)
    assert build_corpus(output, 1, chosen=[source]) == first


def test_sizes_and_reuse_are_printed(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = build_corpus(tmp_path / "corpus.txt", 1, chosen=[source])
    assert report.sha256 in capsys.readouterr().out
    build_corpus(tmp_path / "corpus.txt", 1, chosen=[source])
    assert "reused, sources unchanged" in capsys.readouterr().out


def test_sources_without_prose_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prose in empty: the"):
        build_corpus(tmp_path / "corpus.txt", 1, chosen=[Source("empty", "1", tmp_path)])


@pytest.mark.parametrize(("num_words", "is_kept"), [(3, False), (4, True), (120, True), (121, False)])
def test_sentences_have_4_to_120_words(num_words: int, is_kept: bool) -> None:
    assert is_prose(" ".join(["Boats", *["and"] * (num_words - 2), "harbours."])) is is_kept


@pytest.mark.parametrize(
    "text",
    [
        "boats float on the water.",
        "Boats float on the water",
        "Boats float on the water:",
        r"Boats weigh \frac{1}{2} of the water.",
        "Boats x_1 x_2 x_3 f(x) weigh g(x).",
    ],
)
def test_fragments_and_formulas_are_no_prose(text: str) -> None:
    assert not is_prose(text)


@pytest.mark.parametrize(
    ("marked", "read"),
    [
        ("Use :class:`~a.b.Boat` or :meth:`.sail`.", "Use Boat or sail."),
        ("See `the boats <https://boats.org>`_ and ``sail()``.", "See the boats and sail."),
        ("It is **very** *large* here [2]_.", "It is very large here."),
        ("The proof is in [3]_, on the graph $G$.", "The proof is in [3], on the graph G."),
    ],
)
def test_markup_is_taken_off_its_words(marked: str, read: str) -> None:
    assert plain(marked) == read


def test_variable_at_the_end_of_a_sentence_is_no_initial() -> None:
    text = "Find all of the nodes in G. The nodes are then sorted."
    assert prose_sentences(text) == ["Find all of the nodes in G.", "The nodes are then sorted."]


def test_each_topic_of_the_language_reference_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "pydoc_data" / "topics.py"
    path.parent.mkdir()
    path.write_text(
        "topics = {'b': 'The second topic is here.\\n', 'a': 'Title\\n*****\\n\\nThe first is here.'}"
    )
    assert read_documents(path) == [["The first is here."], ["The second topic is here."]]


def test_standard_library_comes_first_and_each_package_is_found_or_said_to_be_missing() -> None:
    found, missing = installed_sources()
    assert [found[0].name, *sorted([s.name for s in found[1:]] + missing)] == ["python", *sorted(PACKAGES)]


def test_library_files_give_english_prose() -> None:
    library = installed_sources()[0][0]
    sentences = [
        s
        for name in ("argparse.py", "threading.py", "decimal.py")
        for d in read_documents(library.root / name)
        for s in d
    ]
    common = {
        "the",
        "a",
        "an",
        "of",
        "to",
        "is",
        "in",
        "and",
        "be",
        "for",
        "this",
        "that",
        "it",
        "with",
        "or",
        "if",
    }
    sample = random.Random(0).sample(sentences, 50)
    words = " ".join(sample).lower().split()
    # Running English text has 25 to 35 % of these words, code and tables next to none.
    assert sum(word in common for word in words) > 0.2 * len(words)
