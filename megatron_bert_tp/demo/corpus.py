"""The demo corpus: real English that every machine with the package's dependencies has, in its docstrings.

One sentence a line, a blank line between documents; a document is a source file or a topic of the
language reference.  The same installed versions give the same bytes, whatever the number of workers.
"""

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import track

from megatron_bert_tp.demo import prose, sources
from megatron_bert_tp.demo.sources import Document, Source, installed_sources, read_documents
from megatron_bert_tp.errors import DataError

MIN_SENTENCES = 4
MAX_REPEATS = 2
"""How often the same sentence may stand in the corpus; boilerplate repeats up to a hundred times."""


@dataclass(frozen=True)
class SourceReport:
    """What one source gave to the corpus."""

    name: str
    version: str
    documents: int
    sentences: int
    words: int


@dataclass(frozen=True)
class CorpusReport:
    """Size and identity of a corpus file."""

    path: Path
    sources: tuple[SourceReport, ...]
    missing: tuple[str, ...]
    num_bytes: int
    sha256: str
    is_reused: bool

    @property
    def documents(self) -> int:
        """Documents of all sources."""
        return sum(source.documents for source in self.sources)

    @property
    def sentences(self) -> int:
        """Sentences, which are the lines that are not blank."""
        return sum(source.sentences for source in self.sources)

    @property
    def words(self) -> int:
        """Words, as parted by blanks."""
        return sum(source.words for source in self.sources)


def build_corpus(output: Path, workers: int, *, chosen: Sequence[Source] | None = None) -> CorpusReport:
    """Write the corpus to ``output`` with ``workers`` processes, and print its size and SHA-256.

    Reads the standard library and the installed ones of `sources.PACKAGES`, or the ``chosen`` sources.
    A JSON file beside the output records versions and sizes; where they still hold, the output is
    reused.  Raises DataError when no source holds a document.
    """
    console = Console()
    found, missing = (list(chosen), []) if chosen is not None else installed_sources()
    report = _reusable(output, found, missing)
    if report is None:
        report = _write(output, found, missing, _read(found, workers, console))
    _print(report, console)
    return report


def _read(found: Sequence[Source], workers: int, console: Console) -> list[list[Document]]:
    """Documents of each source in order, before repeats are dropped."""
    files = [(number, path) for number, source in enumerate(found) for path in source.files()]
    documents: list[list[Document]] = [[] for _ in found]
    with _mapped([path for _, path in files], workers) as results:
        shown = track(results, "Reading docstrings", total=len(files), console=console)
        for (number, _), of_file in zip(files, shown, strict=True):
            documents[number] += of_file
    return documents


@contextmanager
def _mapped(paths: list[Path], workers: int) -> Iterator[Iterator[list[Document]]]:
    """Results of `read_documents` in the order of ``paths``, from other processes if there are several."""
    if workers <= 1:
        yield map(read_documents, paths)
        return
    # A collection between two files would only look for garbage that parsing does not leave.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=gc.disable) as pool:
        yield pool.map(read_documents, paths, chunksize=8)


def _without_repeats(documents: list[list[Document]]) -> list[list[Document]]:
    """Keep the first `MAX_REPEATS` of equal sentences, and then the documents of 4 sentences or more."""
    seen: Counter[str] = Counter()

    def fresh(document: Document) -> Document:
        seen.update(kept := [s for s in document if seen[s] < MAX_REPEATS])
        return kept

    return [[kept for d in of_source if len(kept := fresh(d)) >= MIN_SENTENCES] for of_source in documents]


def _write(
    output: Path, found: Sequence[Source], missing: Sequence[str], read: list[list[Document]]
) -> CorpusReport:
    documents = _without_repeats(read)
    text = "\n\n".join("\n".join(document) for of_source in documents for document in of_source) + "\n"
    if not text.strip():
        names = ", ".join(source.name for source in found) or "no source"
        raise DataError(f"no prose in {names}: the .py files must be installed with their docstrings")
    content = text.encode()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(content)
    counts = tuple(_count(source, of_source) for source, of_source in zip(found, documents, strict=True))
    report = CorpusReport(output, counts, tuple(missing), len(content), _sha256(content), is_reused=False)
    _record_path(output).write_text(json.dumps(_record(report), indent=1) + "\n")
    return report


def _count(source: Source, documents: list[Document]) -> SourceReport:
    sentences = [sentence for document in documents for sentence in document]
    words = sum(len(sentence.split()) for sentence in sentences)
    return SourceReport(source.name, source.version, len(documents), len(sentences), words)


def _record_path(output: Path) -> Path:
    return output.with_name(output.name + ".json")


def _record(report: CorpusReport) -> dict[str, object]:
    return {
        "rules": _rules(),
        "sources": [asdict(source) for source in report.sources],
        "missing": list(report.missing),
        "bytes": report.num_bytes,
        "sha256": report.sha256,
    }


def _rules() -> str:
    """Identity of the code that picks sentences: another code makes another corpus."""
    modules = (__file__, prose.__file__, sources.__file__)
    return _sha256(b"".join(Path(str(module)).read_bytes() for module in modules))


def _reusable(output: Path, found: Sequence[Source], missing: Sequence[str]) -> CorpusReport | None:
    """Report of the corpus that is there, if the same sources and rules made it and it is whole."""
    if not (output.is_file() and _record_path(output).is_file()):
        return None
    try:
        record = json.loads(_record_path(output).read_text())
        counts = tuple(SourceReport(**source) for source in record["sources"])
    except (ValueError, KeyError, TypeError):
        return None
    content = output.read_bytes()
    report = CorpusReport(output, counts, tuple(missing), len(content), _sha256(content), is_reused=True)
    has_same_sources = [(s.name, s.version) for s in counts] == [(s.name, s.version) for s in found]
    return report if has_same_sources and record == _record(report) else None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _print(report: CorpusReport, console: Console) -> None:
    for name in report.missing:
        console.print(f"{name} is not installed and left out", highlight=False)
    for source in report.sources:
        name = f"{source.name} {source.version}"
        console.print(f"{name:<20} {_sizes(source)}", highlight=False)
    made = "reused, sources unchanged" if report.is_reused else "written"
    console.print(
        f"{'all':<20} {_sizes(report)}, {report.num_bytes:,} bytes", highlight=False, soft_wrap=True
    )
    console.print(f"{report.path} ({made})\nSHA-256 {report.sha256}", highlight=False, soft_wrap=True)


def _sizes(counted: SourceReport | CorpusReport) -> str:
    return f"{counted.documents:>6,} documents {counted.sentences:>7,} sentences {counted.words:>9,} words"
