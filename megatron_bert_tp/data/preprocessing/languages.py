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
_PACKED = (
    "aaabaeafakamanarasavayazbabebgbhbibmbnbobrbscacechcocrcscucvcydadedvdzeeeleneoeseteufafffifjfofrfyga"
    "gdglgngugvhahehihohrhthuhyhziaidieigiiikioisitiujajvkakgkikjkkklkmknkokrkskukvkwkylalblglilnloltlulv"
    "mgmhmimkmlmnmrmsmtmynanbndnengnlnnnonrnvnyocojomorospapiplpsptqurmrnrorurwsascsdsesgsiskslsmsnsosqsr"
    "ssstsusvswtatetgthtitktltntotrtstttwtyugukuruzvevivowawoxhyiyozazhzu"
)
_CODES = frozenset(_PACKED[n : n + 2] for n in range(0, len(_PACKED), 2))


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
