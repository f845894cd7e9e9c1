"""Everything that can be known of a corpus, and everything that is wrong with it."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from megatron_bert_tp.data.byte_progress import ByteProgress
from megatron_bert_tp.data.corpus.facts import corpus_paths
from megatron_bert_tp.data.corpus.mapped import Corpus, check_digest, check_tokenizer
from megatron_bert_tp.data.corpus.scan import LONG_SENTENCE, Found, IndexScan, TokenScan, scan_index, scan_tokens
from megatron_bert_tp.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from megatron_bert_tp.errors import DataError

_UNKNOWN = "[UNK]"  # the one special token that a text may have
_BAR = 40  # characters


@dataclass(frozen=True)
class CorpusReport:
    """A corpus that could be opened, and what a scan of it has found."""

    corpus: Corpus
    index: IndexScan
    tokens: TokenScan
    vocab_size: int | None
    """None when neither a tokenizer nor PREFIX.json tells it."""
    num_bytes: int
    seconds: float
    problems: tuple[str, ...]

    @property
    def usable(self) -> dict[str, dict[str, int]]:
        """For each ``objective.pairs``, the documents that it can use, with their sentences and tokens."""
        pairs = asdict(self.index.with_pairs)
        two_documents = self.index.with_pairs.documents >= 2
        nsp = pairs if two_documents else dict.fromkeys(pairs, 0)  # a random B is of another document
        return {"nsp": nsp, "sop": pairs, "none": asdict(self.index.with_text)}

    @property
    def histogram(self) -> list[tuple[int, int, int]]:
        """Rows (fewest tokens, most tokens, documents), from the first to the last that has a document."""
        counts = self.index.tokens_per_document.tolist()
        rows = [(1 << n >> 1, (1 << n) - 1, count) for n, count in enumerate(counts)]
        filled = [n for n, count in enumerate(counts) if count]
        return rows[filled[0] : filled[-1] + 1]

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        corpus, index, tokens = self.corpus, self.index, self.tokens
        return {
            "prefix": str(corpus.prefix),
            "token_type": str(corpus.tokens.dtype),
            "documents": corpus.num_documents,
            "sentences": corpus.num_sentences,
            "tokens": corpus.num_tokens,
            "empty_documents": corpus.num_documents - index.with_text.documents,
            "documents_of_one_sentence": index.with_text.documents - index.with_pairs.documents,
            "longest_sentence": index.longest_sentence,
            "long_sentences": index.long_sentences,
            "smallest_id": tokens.smallest_id,
            "largest_id": tokens.largest_id,
            "vocab_size": self.vocab_size,
            "special_tokens": {name: found.count for name, found in tokens.special.items()},
            "usable": self.usable,
            "tokens_per_document": self.histogram,
            "bin_sha256": tokens.sha256,
            "bytes": self.num_bytes,
            "seconds": self.seconds,
            "problems": list(self.problems),
        }

    def lines(self) -> list[str]:
        """The report for people."""
        rows = [*self._text_rows(), *self._usable_rows(), *self._token_rows()]
        width = max(len(name) for name, _ in rows)
        found = f"problems: {len(self.problems)}" if self.problems else "no damage found"
        head = f"{self.corpus.prefix}: {found}"
        return [head, *(f"  {name:<{width}}  {value}" for name, value in rows), *self._histogram_lines()]

    def _text_rows(self) -> Iterator[tuple[str, str]]:
        corpus, index = self.corpus, self.index
        mean = corpus.num_tokens / corpus.num_sentences
        yield "documents", f"{corpus.num_documents:,}"
        yield "  empty", f"{corpus.num_documents - index.with_text.documents:,}"
        yield "  of one sentence", f"{index.with_text.documents - index.with_pairs.documents:,}"
        longest = f"the longest of {index.longest_sentence:,}"
        yield "sentences", f"{corpus.num_sentences:,} of {mean:.1f} tokens, {longest}"
        yield f"  over {LONG_SENTENCE} tokens", f"{index.long_sentences:,}"

    def _usable_rows(self) -> Iterator[tuple[str, str]]:
        for pairs, counts in self.usable.items():
            shown = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            yield f"usable for {pairs}", shown

    def _token_rows(self) -> Iterator[tuple[str, str]]:
        corpus, tokens = self.corpus, self.tokens
        yield "tokens", f"{corpus.num_tokens:,} ({corpus.tokens.dtype})"
        known = "unknown: give --tokenizer" if self.vocab_size is None else f"of {self.vocab_size:,} entries"
        yield "  ids", f"{tokens.smallest_id:,} to {tokens.largest_id:,}, vocabulary {known}"
        for name, found in tokens.special.items():
            yield f"  {name}", f"{found.count:,} ({found.count / corpus.num_tokens:.3%})"
        yield "SHA-256", tokens.sha256
        speed = self.num_bytes / self.seconds / 1e6
        yield "scanned", f"{self.num_bytes / 1e6:,.1f} MB in {self.seconds:.1f} s ({speed:,.0f} MB/s)"

    def _histogram_lines(self) -> Iterator[str]:
        most = max(count for _, _, count in self.histogram)
        yield "  tokens of a document"
        for fewest, last, count in self.histogram:
            bounds = f"{fewest:,}" if last <= fewest else f"{fewest:,}-{last:,}"
            yield f"  {bounds:>21} {count:>12,}  {'#' * -(-_BAR * count // most)}".rstrip()


def scan_corpus(prefix: Path, tokenizer: Tokenizer | None) -> CorpusReport:
    """Open a corpus and look at every byte, with a progress bar; DataError when it cannot be opened.

    Ids are compared with the tokenizer or, without one, with the vocabulary's size in PREFIX.json.
    """
    started = time.perf_counter()
    corpus = Corpus.open(prefix)
    bin_path, idx_path, _ = corpus_paths(prefix)
    num_bytes = bin_path.stat().st_size + idx_path.stat().st_size
    vocab_size = tokenizer.size if tokenizer else corpus.facts.vocab_size if corpus.facts else None
    ids = tokenizer.vocabulary.special_ids if tokenizer else ()
    special = dict(zip(SPECIAL_TOKENS, ids, strict=False))
    with ByteProgress(f"Checking {escape(str(prefix))}", num_bytes) as progress:
        index = scan_index(corpus, progress.advance)
        tokens = scan_tokens(corpus, bin_path, vocab_size=vocab_size, special=special, advance=progress.advance)
    problems = (
        *_wrong_ids(corpus, tokens, vocab_size),
        *_special_in_text(corpus, tokens),
        *_wrong_facts(corpus, tokens),
        *_refusals(corpus, tokenizer),
    )
    seconds = time.perf_counter() - started
    return CorpusReport(corpus, index, tokens, vocab_size, num_bytes, seconds, problems)


def _place(corpus: Corpus, found: Found) -> str:
    sentence = corpus.sentence_at(found.first)
    return f"the first in sentence {sentence} of document {corpus.document_of(sentence)}"


def _wrong_ids(corpus: Corpus, tokens: TokenScan, vocab_size: int | None) -> Iterator[str]:
    if not tokens.outside.count:
        return
    allowed = "must not be negative" if vocab_size is None else f"must lie in 0..{vocab_size - 1}"
    yield (
        f"{corpus.prefix}.bin: token ids {allowed}, but {tokens.outside.count} of {corpus.num_tokens} do not, "
        f"{_place(corpus, tokens.outside)}: {int(corpus.tokens[tokens.outside.first])}; "
        "give the tokenizer that made the corpus, copy the corpus again or run `preprocess` again"
    )


def _special_in_text(corpus: Corpus, tokens: TokenScan) -> Iterator[str]:
    for name, found in tokens.special.items():
        if found.count and name != _UNKNOWN:
            yield (
                f"{corpus.prefix}.bin: a corpus holds text alone and {name} is added to samples later, but it "
                f"stands there {found.count} times, {_place(corpus, found)}; make the corpus without it"
            )


def _wrong_facts(corpus: Corpus, tokens: TokenScan) -> Iterator[str]:
    facts = corpus.facts
    if facts is None:
        return
    if facts.bin_sha256 != tokens.sha256:
        yield (
            f"{corpus.prefix}.bin: the .json says that its SHA-256 is {facts.bin_sha256}, but it is "
            f"{tokens.sha256}: the tokens were altered or the .json is of another corpus; copy both again, "
            "or run `preprocess` again"
        )
    if facts.largest_id != tokens.largest_id:
        yield (
            f"{corpus.prefix}.json: says that the largest id is {facts.largest_id}, but it is "
            f"{tokens.largest_id}; copy the corpus again or run `preprocess` again"
        )


def _refusals(corpus: Corpus, tokenizer: Tokenizer | None) -> Iterator[str]:
    """What training would refuse."""
    try:
        check_digest(corpus)
    except DataError as error:
        yield str(error)
    if tokenizer is None:
        return
    try:
        check_tokenizer(corpus, sha256=tokenizer.sha256, lowercase=tokenizer.lowercase)
    except DataError as error:
        yield str(error)
