"""Languages of the sentence splitter: codes of ISO 639-1, and which of them have rules of their own."""

import difflib

from megatron_bert_tp.errors import DataError

OWN_RULES = {
    "am": "Amharic", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "da": "Danish",
    "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French",
    "gu": "Gujarati", "hi": "Hindi", "hy": "Armenian", "it": "Italian", "ja": "Japanese", "kk": "Kazakh",
    "kn": "Kannada", "ml": "Malayalam", "mr": "Marathi", "my": "Burmese", "nl": "Dutch", "pa": "Punjabi",
    "pl": "Polish", "pt": "Portuguese", "ru": "Russian", "sk": "Slovak", "ta": "Tamil", "te": "Telugu",
    "uk": "Ukrainian",
}  # fmt: skip
"""Languages with their own abbreviations; the others have those of a relative, or of English."""
GENERAL_RULES = {"zh": "Chinese", "ko": "Korean", "he": "Hebrew", "fa": "Persian", "ur": "Urdu", "tr": "Turkish"}
"""Well-known ones among the others, for suggestions."""
_CODES = frozenset(
    (
        "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de "
        "dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id "
        "ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu "
        "lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu "
        "rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr "
        "ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu "
    ).split()
)


def language_code(given: str) -> str:
    """The code that the splitter knows for ``given``, such as ``zh`` for ``zh_TW``; DataError with close ones."""
    code = given.strip().lower().replace("_", "-").partition("-")[0]
    if code in _CODES:
        return code
    names = {name.lower(): known for known, name in (OWN_RULES | GENERAL_RULES).items()}
    named = [names[name] for name in difflib.get_close_matches(given.lower(), names, n=1)]
    close = named or difflib.get_close_matches(code, sorted(OWN_RULES | GENERAL_RULES), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise DataError(
        f"--language {given!r} is not a language code of ISO 639-1; {hint}With rules of their own: "
        f"{', '.join(sorted(OWN_RULES))}; any other code has general rules, which know the marks of all scripts"
    )
