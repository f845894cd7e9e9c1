"""Lines of the input, read: text, two columns, or a JSON object."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.errors import DataError

LONGEST_LINE = 10**6
"""Bytes of the longest line that is read: far more than a model of any size reads of a text."""
_ID = "id"
_LONGEST_SHOWN = 60  # characters of a key in an error


@dataclass(frozen=True)
class Sample:
    """What one line asks: a text, and its partners, which are none, a second text, or the choices.

    ``id`` goes to the output as it is.
    """

    text: str
    partners: tuple[str, ...] = ()
    id: JSON = None


@dataclass(frozen=True)
class LineFormat:
    """Keys of a JSON line; ``second`` is that of the partner, which may be left out where it is optional."""

    first: str = "text"
    second: str | None = None
    is_optional: bool = False
    is_list: bool = False

    @property
    def has_columns(self) -> bool:
        """Whether a tab parts two texts."""
        return self.second is not None and not self.is_list

    @property
    def has_plain_text(self) -> bool:
        """Whether a line may be one text alone."""
        return self.second is None or self.is_optional

    def __str__(self) -> str:
        value = '["...", "..."]' if self.is_list else '"..."'
        keys = [f'"{self.first}": "..."', *([f'"{self.second}": {value}'] if self.second else [])]
        ways = ["a text"] * self.has_plain_text + ["two texts with a tab between them"] * self.has_columns
        return " or ".join([*ways, "{" + ", ".join(keys) + "}"])


def read_line(line: bytes, form: LineFormat) -> Sample:
    """Sample of one line without its end; DataError when it is not what ``form`` says."""
    if len(line) > LONGEST_LINE:
        raise DataError(f"the line has more than {LONGEST_LINE} bytes; give the text in several lines")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} of the line is not UTF-8; save the text as UTF-8") from error
    if not text.strip():
        raise DataError(f"the line is empty; give {form}")
    if text.lstrip().startswith("{"):
        return _from_json(text, form)
    columns = text.split("\t") if form.has_columns else [text]
    if len(columns) > 2 or (len(columns) == 1 and not form.has_plain_text):
        raise DataError(f"the line has {len(columns)} column{'s' * (len(columns) > 1)}; give {form}")
    return _checked(Sample(columns[0], tuple(columns[1:])), form)


def _from_json(text: str, form: LineFormat) -> Sample:
    try:
        values = json.loads(
            text, parse_constant=_refused, parse_float=_finite, object_pairs_hook=_without_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise DataError(f"the line begins like JSON and is none ({error}); give {form}") from error
    _check_keys(values, form)
    first, second = values[form.first], values.get(form.second)
    partners = second if form.is_list else [] if second is None else [second]
    if not isinstance(first, str) or not isinstance(partners, list):
        raise DataError(f"a value has the wrong type; give {form}")
    if not all(isinstance(partner, str) for partner in partners):
        raise DataError(f"a value of {form.second!r} is no text; give {form}")
    _check_id(values.get(_ID))
    return _checked(Sample(first, tuple(partners), values.get(_ID)), form)


def _refused(number: str) -> float:
    raise DataError(f"{_shown(number)} cannot be written as a number of JSON; give a finite number, or a text")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refused(text)


def _without_duplicates(pairs: Sequence[tuple[str, JSON]]) -> dict[str, JSON]:
    values: dict[str, JSON] = {}
    for name, value in pairs:
        if name in values:
            raise DataError(f"the key {_shown(name)} is there twice; leave one of them out")
        values[name] = value
    return values


def _check_id(value: JSON) -> None:
    """DataError for an ``id`` that could be read but not be written again."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the value of {_ID!r} has half of a surrogate pair; give whole characters") from error
    except RecursionError as error:
        raise DataError(f"the value of {_ID!r} is nested too deeply; give a number or a text") from error


def _shown(name: str) -> str:
    """In quotes, and cut where it is long: whoever reads an error needs no megabytes."""
    return repr(name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}...")


def _check_keys(values: Mapping[str, JSON], form: LineFormat) -> None:
    known = [form.first, *([form.second] if form.second else []), _ID]
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"give {form}"
            raise DataError(f"the key {_shown(name)} is not known; {hint}")
    needed = known[:1] if form.is_optional else known[:-1]
    for name in needed:
        if name not in values:
            raise DataError(f"the key {name!r} is missing; give {form}")


def _checked(sample: Sample, form: LineFormat) -> Sample:
    """The sample, if every text of it has a letter or sign that can be written as UTF-8."""
    if form.is_list and len(sample.partners) < 2:
        raise DataError(f"{form.second!r} needs two texts or more; give {form}")
    for text in (sample.text, *sample.partners):
        if not text.strip():
            raise DataError(f"a text is empty; give {form}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"character {error.start} of a text is half of a surrogate pair") from error
    return sample
