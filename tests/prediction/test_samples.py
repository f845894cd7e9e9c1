"""Lines are read as documented, and whatever cannot be read is told by its rule and the way out."""

import json

import pytest

from megatron_bert_tp.errors import DataError
from megatron_bert_tp.prediction.samples import LONGEST_LINE, Sample, read_line
from megatron_bert_tp.prediction.tasks import TASKS

ANSWERING, CHOICE = "question-answering", "multiple-choice"


@pytest.mark.parametrize(
    ("task", "line", "sample"),
    [
        ("fill-mask", "a\t[MASK]", Sample("a\t[MASK]")),
        ("fill-mask", '{"text": "{ is [MASK]"}', Sample("{ is [MASK]")),
        ("ner", " é ", Sample(" é ")),
        ("next-sentence", "a\tb", Sample("a", ("b",))),
        ("next-sentence", '{"text_pair": "b\\tc", "text": "a", "id": [1]}', Sample("a", ("b\tc",), [1])),
        ("classification", "a", Sample("a")),
        ("classification", "a\tb", Sample("a", ("b",))),
        ("classification", ' {"text": "a", "text_pair": null}', Sample("a")),
        (ANSWERING, "why?\tso", Sample("why?", ("so",))),
        (ANSWERING, '{"question": "why?", "context": "so", "id": "7"}', Sample("why?", ("so",), "7")),
        (CHOICE, '{"prompt": "a", "choices": ["b", "c"]}', Sample("a", ("b", "c"))),
    ],
)
def test_a_line_is_read(task, line, sample):
    assert read_line(line.encode(), TASKS[task].form) == sample


@pytest.mark.parametrize(
    ("task", "line", "told"),
    [
        ("fill-mask", "", 'the line is empty; give a text or {"text": "..."}'),
        ("fill-mask", " \t\u3000", "the line is empty"),
        ("fill-mask", b"ab\xff", "byte 2 of the line is not UTF-8"),
        ("fill-mask", "{not json", "the line begins like JSON and is none"),
        ("fill-mask", '{"text": ' + "[" * 100_000, "the line begins like JSON and is none"),
        ("fill-mask", '{"text": 1}', "a value has the wrong type"),
        ("fill-mask", '{"text": " "}', "a text is empty"),
        ("fill-mask", '{"text": "\\ud800"}', "half of a surrogate pair"),
        ("fill-mask", '{"txt": "a"}', "the key 'txt' is not known; did you mean 'text'?"),
        ("fill-mask", "{}", "the key 'text' is missing"),
        ("fill-mask", '{"text": "a", "id": 1e999}', "'1e999' cannot be written as a number of JSON"),
        ("fill-mask", '{"text": "a", "id": [-1e999]}', "'-1e999' cannot be written"),
        ("fill-mask", '{"text": "a", "id": NaN}', "'NaN' cannot be written"),
        ("fill-mask", '{"text": "a", "id": {"b": -Infinity}}', "'-Infinity' cannot be written"),
        ("fill-mask", '{"text": "a", "id": "\\ud800"}', "the value of 'id' has half of a surrogate pair"),
        ("fill-mask", '{"text": "a", "id": [{"\\udfff": 1}]}', "the value of 'id' has half of a surrogate pair"),
        ("fill-mask", '{"text": "a", "text": "b"}', "the key 'text' is there twice; leave one of them out"),
        ("fill-mask", '{"text": "a", "id": {"b": 1, "b": 1}}', "the key 'b' is there twice"),
        ("fill-mask", '{"text": "a", "id": ' + "9" * 5000 + "}", "the line begins like JSON and is none"),
        ("fill-mask", "a" * (LONGEST_LINE + 1), "the line has more than 1000000 bytes"),
        (ANSWERING, '{"question": "a", "context": "\\ud800"}', "half of a surrogate pair"),
        (CHOICE, '{"prompt": "a", "choices": ["b", "\\ud800"]}', "half of a surrogate pair"),
        ("ner", '{"text": "a", "text_pair": "b"}', "the key 'text_pair' is not known"),
        ("next-sentence", "alone", "the line has 1 column; give two texts with a tab between them or {"),
        ("next-sentence", "a\tb\tc", "the line has 3 columns"),
        ("next-sentence", "a\t", "a text is empty"),
        ("next-sentence", '{"text": "a"}', "the key 'text_pair' is missing"),
        ("next-sentence", '{"text": "a", "text_pair": ["b"]}', "a value of 'text_pair' is no text"),
        ("classification", "a\tb\tc", "the line has 3 columns"),
        (ANSWERING, "why?", "the line has 1 column"),
        (ANSWERING, '{"question": "why?", "contex": "so"}', "did you mean 'context'?"),
        (ANSWERING, '{"question": "why?", "context": ""}', "a text is empty"),
        (CHOICE, "a\tb", 'give {"prompt": "...", "choices": ["...", "..."]}'),
        (CHOICE, '{"prompt": "a", "choices": "bc"}', "a value has the wrong type"),
        (CHOICE, '{"prompt": "a", "choices": ["b"]}', "'choices' needs two texts or more"),
        (CHOICE, '{"prompt": "a", "choices": ["b", 2]}', "a value of 'choices' is no text"),
    ],
)
def test_a_bad_line_is_told(task, line, told):
    with pytest.raises(DataError) as caught:
        read_line(line if isinstance(line, bytes) else line.encode(), TASKS[task].form)
    assert told in str(caught.value)


@pytest.mark.parametrize("task", TASKS)
def test_what_an_error_proposes_is_read(task):
    form = TASKS[task].form
    proposed = str(form).rpartition(" or ")[2]
    assert read_line(proposed.encode(), form).text == "..."
    assert set(json.loads(proposed)) == {form.first, form.second} - {None}


def test_the_longest_line_is_read_and_a_long_key_is_not_echoed():
    form = TASKS["ner"].form
    assert len(read_line(b"a" * LONGEST_LINE, form).text) == LONGEST_LINE
    key, digits = "k" * (LONGEST_LINE // 3), "9" * (LONGEST_LINE // 2)
    lines = [f'{{"{key}": 1}}', f'{{"text": "a", "id": {{"{key}": 1, "{key}": 2}}}}', f'{{"id": 1e{digits}}}']
    for line in lines:
        with pytest.raises(DataError) as caught:
            read_line(line.encode(), form)
        assert len(str(caught.value)) < 200
