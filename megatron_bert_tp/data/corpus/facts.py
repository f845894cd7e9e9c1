"""PREFIX.json: what is known of a corpus beside its tokens; and the names of a corpus' three files."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeAlias

from megatron_bert_tp.errors import DataError

Report: TypeAlias = Mapping[str, object]

_OPTIONAL = {"index_sha256", "report"}


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """What PREFIX.json says of a corpus."""

    documents: int
    sentences: int
    tokens: int
    largest_id: int
    bin_sha256: str
    index_sha256: str | None = None
    """`Corpus.digest`; None in files of earlier versions."""
    vocab_size: int
    tokenizer_sha256: str
    lowercase: bool
    report: Report | None = None
    """What `preprocess` met on the way; None where it was not asked for, and in files of version 0.1."""

    def write(self, path: Path) -> None:
        """Save as JSON."""
        content = {key: value for key, value in asdict(self).items() if value is not None}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "CorpusFacts":
        """Facts of a JSON file, whatever else it holds; DataError when one of them is missing."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}); remove it or run `preprocess` again") from error
        types = {field.name: field.type for field in fields(cls) if field.name not in _OPTIONAL}
        is_whole = isinstance(content, dict) and all(type(content.get(key)) is kind for key, kind in types.items())
        if not is_whole or not isinstance(content.get("index_sha256", ""), str):
            raise DataError(
                f"{path}: the facts of a corpus have the keys {', '.join(types)}, each with a value of its kind; "
                "move the file away or run `preprocess` again"
            )
        report = content.get("report")
        return cls(
            index_sha256=content.get("index_sha256"),
            report=report if isinstance(report, dict) else None,
            **{key: content[key] for key in types},
        )


def corpus_paths(prefix: Path) -> tuple[Path, Path, Path]:
    """PREFIX.bin, PREFIX.idx and PREFIX.json."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def temporary(path: Path) -> Path:
    """Name of a file until it is whole."""
    return path.with_name(f"{path.name}.unfinished")
