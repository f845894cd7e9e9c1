"""Small vocabularies and texts of every kind; needs nothing but Python, so that two environments can read it."""

import string

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "of", "and", "in", "was", "##ing", "##ed", "##er", "find", "river", "school", "1898", "don"]
SIGNS = [*".,;:!?'\"()-%&", "\u2014", "😀", *"東京大学山"]
LETTERS = string.ascii_lowercase + string.digits


def _entries(letters: str, more: list[str]) -> list[str]:
    return [*SPECIAL, *WORDS, *more, *SIGNS, *letters, *(f"##{letter}" for letter in letters)]


VOCABULARIES = {
    "uncased": _entries(LETTERS, ["london", "zur", "cafe"]),
    "cased": _entries(LETTERS + string.ascii_uppercase + "éü", ["London", "Zür", "café", "The"]),
}

TEXTS = [
    "The river was found in 1898.",
    "Zürich's CAFÉ don't open: naïve Åse (of London) waited!",
    "東京大学 and 山川 in Tokyo",
    "so 😀😀 happy 🎉 the end \u2014 100% of it",
    "x",
    "finding the finder and the school, " * 6 + "was finding.",
    "tabs are no\u00a0problem,  nor\u3000are   wide spaces\u200b or marks e\u0301",
]
PAIRS = [
    ("The river", "was found in London."),
    ("Who ran the café?", "東京大学 did 😀, and Zürich's school don't."),
    ("a", "finding " * 20),
    ("finding " * 15, "b"),
]
LONG = " ".join(f"The {n}th river of London was found by Åse in {1800 + n}; 東京 don't mind." for n in range(40))
"""About 2000 tokens of the small vocabularies, 800 of BERT's."""
