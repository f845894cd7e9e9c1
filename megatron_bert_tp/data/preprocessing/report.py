"""What became of the input of `preprocess`: counted on the way, told at the end."""

from dataclasses import dataclass, field

import numpy as np

from megatron_bert_tp.data.corpus.facts import CorpusFacts, Report
from megatron_bert_tp.data.corpus.writer import Documents, Written
from megatron_bert_tp.data.preprocessing.documents import InputCounts
from megatron_bert_tp.data.preprocessing.encoding import EncodedChunk

_POWERS = 2 ** np.arange(1, 48, dtype=np.int64)
_BAR = 40  # characters
_MANY_SINGLE = 0.2  # share of documents of one sentence from which on it is noted


@dataclass
class Tally:
    """Counts over all that was written."""

    num_bytes: int = 0
    """Unpacked bytes of text."""
    empty_documents: int = 0
    """Documents without a token."""
    empty_sentences: int = 0
    """Sentences without a token."""
    unknown_tokens: int = 0
    single_sentence_documents: int = 0
    longest_sentence: int = 0
    """Tokens of the longest sentence, the first of several."""
    longest_sentence_number: int = 0
    """Its place in the corpus, from 0."""
    histogram: list[int] = field(default_factory=list)
    """Documents of 1 token, of 2 to 3, of 4 to 7, and so on."""

    def add(self, chunk: EncodedChunk, documents: Documents, *, before: Written, num_bytes: int) -> None:
        """Count a chunk that was written after ``before``."""
        self.num_bytes += num_bytes
        self.empty_documents += documents.dropped
        self.empty_sentences += chunk.empty_sentences
        self.unknown_tokens += chunk.unknown
        self.single_sentence_documents += int(np.count_nonzero(documents.sentences == 1))
        if len(chunk.lengths) and chunk.lengths.max() > self.longest_sentence:
            self.longest_sentence = int(chunk.lengths.max())
            self.longest_sentence_number = before.sentences + int(chunk.lengths.argmax())
        sizes = np.bincount(np.searchsorted(_POWERS, documents.tokens, side="right")).tolist()
        counts = self.histogram + [0] * (len(sizes) - len(self.histogram))
        self.histogram = [old + (sizes[n] if n < len(sizes) else 0) for n, old in enumerate(counts)]


def report_of(tally: Tally, counts: InputCounts, *, num_tokens: int) -> Report:
    """The report as PREFIX.json keeps it; nothing in it depends on the run, only on input and options."""
    return {
        "text_bytes": tally.num_bytes,
        "unknown_tokens": tally.unknown_tokens,
        "unknown_rate": round(tally.unknown_tokens / max(num_tokens, 1), 9),
        "dropped": {
            "documents_without_a_token": tally.empty_documents,
            "sentences_without_a_token": tally.empty_sentences,
            "files_without_text": counts.empty_files,
            "records_without_text": counts.empty_records,
            "lines_that_are_not_utf8": counts.dropped_lines,
        },
        "mended_lines": counts.replaced_lines,
        "single_sentence_documents": tally.single_sentence_documents,
        "longest_sentence": {"tokens": tally.longest_sentence, "number": tally.longest_sentence_number},
        "tokens_per_document": {_range(n): count for n, count in enumerate(tally.histogram) if count},
    }


@dataclass(frozen=True)
class PreprocessReport:
    """What became of the input, for people."""

    facts: CorpusFacts
    tally: Tally
    counts: InputCounts
    seconds: float
    """Of this run."""
    run_bytes: int
    """Unpacked bytes that this run has read."""

    @property
    def dropped_documents(self) -> int:
        """Documents in which no sentence had a token."""
        return self.tally.empty_documents

    def __str__(self) -> str:
        rows = [(name, value) for name, value in self._rows() if value]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        return "\n".join([*lines, *self._histogram(width), *self._advice()])

    def _rows(self) -> list[tuple[str, str]]:
        facts, tally = self.facts, self.tally
        speed = self.run_bytes / 1e6 / max(self.seconds, 1e-9)
        rate = tally.unknown_tokens / max(facts.tokens, 1)
        single = tally.single_sentence_documents
        return [
            ("documents", f"{facts.documents:,}"),
            ("of one sentence", f"{single:,} ({single / max(facts.documents, 1):.0%})" if single else ""),
            ("sentences", f"{facts.sentences:,}"),
            ("tokens", f"{facts.tokens:,}"),
            ("letters", "lowercased" if facts.lowercase else "as they are"),
            ("unknown tokens", f"{tally.unknown_tokens:,} ({rate:.4%})"),
            ("longest sentence", f"{tally.longest_sentence:,} tokens, number {tally.longest_sentence_number:,}"),
            ("dropped", ", ".join(self._dropped()) or "nothing"),
            ("mended", f"{self.counts.replaced_lines:,} lines" if self.counts.replaced_lines else ""),
            ("text", f"{tally.num_bytes / 1e6:.1f} MB"),
            ("this run", f"{self.run_bytes / 1e6:.1f} MB in {self.seconds:.1f} s, {speed:.2f} MB/s"),
            (".bin SHA-256", facts.bin_sha256),
        ]

    def _dropped(self) -> list[str]:
        found = {
            "{:,} documents without a token": self.tally.empty_documents,
            "{:,} sentences without a token": self.tally.empty_sentences,
            "{:,} files without text": self.counts.empty_files,
            "{:,} records without text": self.counts.empty_records,
            "{:,} lines that are not UTF-8": self.counts.dropped_lines,
        }
        return [text.format(count) for text, count in found.items() if count]

    def _histogram(self, width: int) -> list[str]:
        most = max(self.tally.histogram, default=0)
        lines = ["tokens of a document"]
        for number, count in enumerate(self.tally.histogram):
            if count:
                bar = "#" * max(1, round(_BAR * count / most))
                lines.append(f"{_range(number):>{max(width, 15)}}  {count:>11,}  {bar}")
        return lines

    def _advice(self) -> list[str]:
        single, documents = self.tally.single_sentence_documents, self.facts.documents
        several = documents - single
        if several < 2:
            return [
                f"note: next-sentence prediction needs two documents of two sentences or more, here there are "
                f"{several}: see how documents are separated, or train with objective.pairs="
                f"{'sop or none' if several else 'none'}"
            ]
        if single > _MANY_SINGLE * documents:
            return [
                f"note: {single:,} of {documents:,} documents have one sentence, and objective.pairs=nsp and sop "
                "pass over them: blank lines end a document of plain text, --document-per-file keeps a file whole"
            ]
        return []


def _range(number: int) -> str:
    first = 1 << number
    return f"{first}" if number == 0 else f"{first}-{2 * first - 1}"
