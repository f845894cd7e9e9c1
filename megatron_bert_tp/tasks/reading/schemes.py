"""How tags mark entities, and the way to IOB2.

    text    Anna  and   Bo    Lee   Ann   met
    IOB1    I-P   O     I-P   I-P   B-P   O      B- only where an entity follows another of its type
    IOB2    B-P   O     B-P   I-P   B-P   O      B- begins every entity
    BIOES   S-P   O     B-P   E-P   S-P   O      E- ends, S- is an entity of one word (BILOU: L- and U-)

An entity goes on with ``I-`` (``E-``, ``L-``) of the same type and begins anew otherwise, in all of them, as the
CoNLL evaluation has it; so a tag that its scheme does not allow at its place has a meaning too, and is repaired.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Scheme = Literal["iob1", "iob2", "bioes"]
OUTSIDE = "O"
PREFIXES: dict[Scheme, str] = {"iob1": "BI", "iob2": "BI", "bioes": "BIESLU"}
"""What may stand before the dash."""
_BEGINNING: dict[Scheme, str] = {"iob1": "BI", "iob2": "B", "bioes": "BSU"}
"""What may stand on the first word of an entity."""
_ALONE = "SU"
_LAST = "ELSU"


@dataclass(frozen=True)
class Converted:
    """Tags as IOB2, and how many of the given ones their scheme does not allow at their place."""

    tags: tuple[str, ...]
    num_repaired: int


def is_tag(tag: str) -> bool:
    """Whether it is ``O``, or a prefix of any scheme, a dash and a type."""
    return tag == OUTSIDE or (len(tag) > 2 and tag[1] == "-" and tag[0] in PREFIXES["bioes"])


def to_iob2(tags: Sequence[str], scheme: Scheme) -> Converted:
    """The same entities in IOB2; the tags of one sentence, valid by `is_tag` and `PREFIXES`."""
    found, num_repaired = [], 0
    going_on = ""  # type of an entity that the next word may belong to
    for tag in tags:
        prefix, _, name = tag.partition("-")
        begins = bool(name) and (prefix in "B" + _ALONE or name != going_on)
        is_cut_short = scheme == "bioes" and going_on != "" and (begins or not name)
        num_repaired += is_cut_short or (begins and prefix not in _BEGINNING[scheme])
        found.append(f"{'B' if begins else 'I'}-{name}" if name else OUTSIDE)
        going_on = "" if prefix in _LAST else name
    num_repaired += scheme == "bioes" and going_on != ""
    return Converted(tuple(found), num_repaired)


def scheme_of(sentences: Iterable[Sequence[str]]) -> Scheme:
    """The scheme that tags follow.

    BIOES where any of ``E- S- L- U-`` is there.  Else IOB1 where entities that do not follow one of their type
    begin with ``I-`` and never with ``B-``.  Else IOB2: either they all begin with ``B-``, or both are found, and
    those with ``I-`` are repaired, which gives the entities that IOB1 has too.
    """
    beginnings = set()
    for tags in sentences:
        before = ""
        for tag in tags:
            prefix, _, name = tag.partition("-")
            if name and prefix in _LAST:
                return "bioes"
            if name and name != before:
                beginnings.add(prefix)
            before = name
    return "iob1" if beginnings == {"I"} else "iob2"
