"""Sentences in columns, and the ways in which tags mark entities."""

import random
from collections import Counter
from itertools import product

import pytest

from megatron_bert_tp.tasks.reading.schemes import scheme_of, to_iob2
from tests.sources import real_data
from tests.tasks.reading import read, refusal, task, write

NER = "token-classification"

# Spans, by parsers of our own: one for each scheme, from its definition.
Span = tuple[int, int, str]  # first word, word after the last, type


def spans_of_iob2(tags):
    found: list[Span] = []
    for place, tag in enumerate(tags):
        if tag.startswith("B-"):
            found.append((place, place + 1, tag[2:]))
        elif tag.startswith("I-"):
            start, end, name = found.pop()
            assert (end, name) == (place, tag[2:]), "valid IOB2 has I- after the same entity alone"
            found.append((start, place + 1, name))
    return found


def iob1_of(spans, length):
    tags = ["O"] * length
    for number, (start, end, name) in enumerate(spans):
        touches = number > 0 and spans[number - 1][1:] == (start, name)
        tags[start:end] = [f"{'B' if touches else 'I'}-{name}", *[f"I-{name}"] * (end - start - 1)]
    return tags


def iob2_of(spans, length):
    tags = ["O"] * length
    for start, end, name in spans:
        tags[start:end] = [f"B-{name}", *[f"I-{name}"] * (end - start - 1)]
    return tags


def bioes_of(spans, length, last="E", alone="S"):
    tags = ["O"] * length
    for start, end, name in spans:
        inner = [f"I-{name}"] * (end - start - 2)
        tags[start:end] = [f"B-{name}", *inner, f"{last}-{name}"] if end - start > 1 else [f"{alone}-{name}"]
    return tags


def bilou_of(spans, length):
    return bioes_of(spans, length, last="L", alone="U")


WRITERS = {"iob1": iob1_of, "iob2": iob2_of, "bioes": bioes_of, "bilou": bilou_of}


def random_spans(drawn, length):
    found, place = [], 0
    while place < length:
        end = min(length, place + drawn.randint(1, 4))
        if drawn.random() < 0.6:
            found.append((place, end, drawn.choice(["PER", "LOC", "creative-work"])))
        place = end
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_the_entities_stay_the_same_in_iob2(name):
    drawn = random.Random(7)
    for _ in range(500):
        length = drawn.randint(1, 12)
        spans = random_spans(drawn, length)
        tags = WRITERS[name](spans, length)
        converted = to_iob2(tags, {"bilou": "bioes"}.get(name, name))
        assert spans_of_iob2(converted.tags) == spans, tags
        assert converted.num_repaired == 0


@pytest.mark.parametrize("name", WRITERS)
def test_the_scheme_is_judged_by_all_tags(name):
    drawn = random.Random(8)
    sentences = [WRITERS[name](random_spans(drawn, 12), 12) for _ in range(30)]
    assert scheme_of(sentences) == {"bilou": "bioes"}.get(name, name)


def test_whatever_the_judgement_the_entities_are_those_of_the_scheme():
    # Few tags do not tell the schemes apart: every way of three words and two types, in each scheme.
    tags = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    told = Counter()
    for sentence in product(tags, repeat=3):
        scheme = scheme_of([sentence])
        told[scheme] += 1
        assert to_iob2(sentence, "iob1").tags == to_iob2(sentence, "iob2").tags == to_iob2(sentence, scheme).tags
        assert to_iob2(sentence, "bioes").tags == to_iob2(sentence, scheme).tags
    assert told == {"iob1": told["iob1"], "iob2": 125 - told["iob1"]}


# What the CoNLL evaluation makes of tags that a scheme does not allow, and how many of them there are.
REPAIRS = [
    ("iob2", "I-X I-X O I-X", "B-X I-X O B-X", 2),
    ("iob2", "B-X I-Y I-Y", "B-X B-Y I-Y", 1),
    ("iob2", "O B-X I-X", "O B-X I-X", 0),
    ("iob1", "I-X I-Y B-Y O", "B-X B-Y B-Y O", 0),
    ("bioes", "I-X E-X O", "B-X I-X O", 1),
    ("bioes", "B-X I-X O", "B-X I-X O", 1),
    ("bioes", "B-X B-X E-X", "B-X B-X I-X", 1),
    ("bioes", "E-X", "B-X", 1),
    ("bioes", "S-X I-X E-X", "B-X B-X I-X", 1),
    ("bioes", "B-X E-X E-X", "B-X I-X B-X", 1),
    ("bioes", "B-X", "B-X", 1),
    ("bioes", "B-X E-Y", "B-X B-Y", 1),
]


@pytest.mark.parametrize(("scheme", "given", "tags", "count"), REPAIRS)
def test_a_tag_that_is_not_allowed_begins_an_entity_and_is_counted(scheme, given, tags, count):
    converted = to_iob2(given.split(), scheme)
    assert " ".join(converted.tags) == tags
    assert converted.num_repaired == count


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        (["O O"], "iob2"),
        (["I-X O", "I-X B-X"], "iob1"),
        (["I-X I-Y"], "iob1"),
        (["B-X I-X"], "iob2"),
        (["B-X B-X", "I-X I-X"], "iob2"),
        (["B-X I-X", "S-X"], "bioes"),
        (["B-X L-X"], "bioes"),
        (["I-X B-X B-X"], "iob1"),
    ],
)
def test_the_judgement_is_as_defined(sentences, scheme):
    assert scheme_of([sentence.split() for sentence in sentences]) == scheme


# Files


def test_spaces_or_tabs_part_the_columns_and_blank_lines_the_sentences(tmp_path):
    path = write(
        tmp_path / "train.conll",
        "Bo NNP I-NP B-PER",
        "left VBD  I-VP O",
        "",
        "New York\tB-LOC",
        " \t",
        "",
        "He O",
        end="\r\n",
    )
    reading = read(NER, path)
    assert [(e.words, e.tags, e.id, e.place) for e in reading.examples] == [
        (("Bo", "left"), ("B-PER", "O"), "0", f"{path}:1"),
        (("New York",), ("B-LOC",), "1", f"{path}:4"),
        (("He",), ("O",), "2", f"{path}:7"),
    ]
    assert reading.notes == ()


def test_white_space_of_other_scripts_is_part_of_a_word(tmp_path):
    path = write(tmp_path / "train.conll", "a\u00a0b B-PER", "\u3000 O")
    assert read(NER, path).examples[0].words == ("a\u00a0b", "\u3000")


def test_documents_are_numbered_over_all_files(tmp_path):
    start = "-DOCSTART- -X- O O"
    first = write(tmp_path / "a.conll", start, "", "a O", "", "b O", start, "c O")
    second = write(tmp_path / "b.conll", "d O", "", "e O", "", start, "", start, "", "f O")
    reading = read(NER, first, second)
    assert [(e.words[0], e.document, e.id, e.group) for e in reading.examples] == [
        ("a", 1, "a:0", "a"),
        ("b", 1, "a:1", "a"),
        ("c", 2, "a:2", "a"),
        ("d", 3, "b:0", "b"),
        ("e", 3, "b:1", "b"),
        ("f", 5, "b:2", "b"),
    ]


def test_the_scheme_of_all_files_is_judged_and_told(tmp_path):
    first = write(tmp_path / "a.conll", "Bo I-PER", "Lee I-PER")
    second = write(tmp_path / "b.conll", "Bo I-PER", "Ann B-PER", "Ed S-LOC")
    reading = read(NER, first)
    assert reading.examples[0].tags == ("B-PER", "I-PER")
    assert reading.notes == (f"{first}: the tags are IOB1, judged by all of them, and read as IOB2",)
    both = read(NER, first, second)
    assert [e.tags for e in both.examples] == [("B-PER", "I-PER"), ("B-PER", "B-PER", "B-LOC")]
    assert both.notes[0].startswith(f"{first}, {second}: the tags are BIOES")


def test_tags_that_the_scheme_does_not_allow_are_repaired_and_told(tmp_path):
    path = write(tmp_path / "train.conll", "Bo I-PER", "Lee I-PER", "", "Ed I-LOC")
    reading = read(task(NER, scheme="iob2"), path)
    assert [e.tags for e in reading.examples] == [("B-PER", "I-PER"), ("B-LOC",)]
    assert reading.notes == (f"{path}: 2 tags are not where IOB2 allows it; read as the CoNLL evaluation does",)


def test_words_alone_are_read_where_labels_are_not_needed(tmp_path):
    path = write(tmp_path / "test.conll", "Bo", "left", "", "He")
    assert [(e.words, e.tags) for e in read(NER, path, part="test").examples] == [
        (("Bo", "left"), None),
        (("He",), None),
    ]
    tagged = write(tmp_path / "tagged.conll", "Bo B-PER")
    assert read(NER, tagged, part="test").examples[0].tags == ("B-PER",)
    parts = write(tmp_path / "parts.conll", "Bo NNP", "O O")
    assert read(NER, parts, part="test").examples[0].tags is None
    assert refusal(NER, path).startswith(f"{path}:1: the word 'Bo' has no tag;")


REAL = [("wnut17train.conll", 3394), ("emerging.dev.conll", 1009), ("emerging.test.annotated", 1287)]


@pytest.mark.parametrize(("name", "count"), REAL)
def test_all_words_and_tags_of_a_real_file_are_read(name, count):
    path = real_data(f"wnut17/{name}")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")]
    words = [row for row in rows if row[0].strip()]
    reading = read(NER, path)
    assert len(reading.examples) == count
    assert [word for e in reading.examples for word in e.words] == [row[0] for row in words]
    assert [tag for e in reading.examples for tag in e.tags] == [row[1] for row in words]
    assert reading.notes == ()


BAD = [
    (["Bo B-PER", "left"], ":2: the word 'left' has no tag"),
    (["Bo B-PER", "left NNP"], ":2: the tag 'NNP' is neither 'O' nor a prefix"),
    (["Bo B-PER", "left B-"], ":2: the tag 'B-' is neither"),
    (["Bo PER"], ":1: the tag 'PER' is neither"),
    (["Bo\tB-PER", "\tO"], ":2: the first column is empty"),
    (["Bo\tB-PER\t"], ":1: the tag '' is neither"),
    ([""], ": has no example of the task"),
]


@pytest.mark.parametrize(("lines", "message"), BAD)
def test_a_bad_line_is_refused_with_its_number(lines, message, tmp_path):
    path = write(tmp_path / "train.conll", *lines)
    assert refusal(NER, path).startswith(f"{path}{message}")


def test_a_tag_of_another_scheme_than_the_declared_one_is_refused(tmp_path):
    path = write(tmp_path / "train.conll", "Bo B-PER", "", "Ed S-LOC")
    assert refusal(task(NER, scheme="iob2"), path).startswith(
        f"{path}:3: the tag 'S-LOC' is none of the scheme 'iob2'"
    )


def test_one_empty_file_of_two_is_told(tmp_path):
    paths = [write(tmp_path / "a.conll", "Bo B-PER"), write(tmp_path / "b.conll", "-DOCSTART- O")]
    assert refusal(NER, *paths).startswith(f"{paths[1]}: has no example of the task")


def test_one_line_without_a_tag_does_not_hide_all_others(tmp_path):
    path = write(tmp_path / "test.conll", "a O", "b B-PER", "", "c b-PER")
    assert f"{path}:4: the tag 'b-PER' is neither 'O' nor" in refusal("token-classification", path, part="test")
    bare = read("token-classification", write(path, "a x", "b y", "c O"), part="test")
    assert [example.tags for example in bare.examples] == [None]
