"""PREFIX.progress.json: how far a corpus has come, so that a killed `preprocess` can go on where it stopped."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_bert_tp.data.corpus.facts import CorpusFacts, corpus_paths, temporary
from megatron_bert_tp.data.corpus.writer import Written, temporary_paths
from megatron_bert_tp.data.preprocessing.documents import InputCounts
from megatron_bert_tp.data.preprocessing.pieces import Place
from megatron_bert_tp.data.preprocessing.report import Tally
from megatron_bert_tp.data.refusals import writing
from megatron_bert_tp.errors import DataError

_FORMAT = 2


@dataclass(frozen=True)
class Mark:
    """A state to go on from: where the input stands, what is written, and what was counted."""

    place: Place = field(default_factory=Place)
    written: Written = field(default_factory=Written)
    tally: Tally = field(default_factory=Tally)
    counts: InputCounts = field(default_factory=InputCounts)


@dataclass(frozen=True)
class Request:
    """What decides the bytes of a corpus."""

    inputs: list[list[str | int]]
    """Path, size and time of change of each file."""
    options: Mapping[str, str | bool | int]

    @classmethod
    def of(cls, inputs: list[Path], options: Mapping[str, str | bool | int]) -> "Request":
        """Request for these files as they are now."""
        states = [(path, path.stat()) for path in inputs]
        return cls([[str(path.resolve()), s.st_size, s.st_mtime_ns] for path, s in states], dict(options))


@dataclass(frozen=True)
class Beginning:
    """Where a run begins, and why not at an earlier run's place where there was one."""

    mark: Mark = field(default_factory=Mark)
    is_complete: bool = False
    """Whether only the renaming of the files is left."""
    refused: str | None = None


class Journal:
    """The journal of one corpus, for one request."""

    def __init__(self, prefix: Path, request: Request):
        self.path = Path(f"{prefix}.progress.json")
        self._prefix = prefix
        self._request = request
        self._here = self._fallback = Mark()

    def move(self, mark: Mark) -> None:
        """Note how far the corpus has come, without saving it."""
        before = self._here
        if mark.place.file != before.place.file:
            # Where the current file gets changed, the run goes back to before that file.
            self._fallback = before if mark.place.offset else mark
        self._here = mark

    def save(self, complete: CorpusFacts | None = None) -> None:
        """Write the journal so that a kill at any moment leaves the old one or the new one.

        ``complete``: the facts of the corpus, where only the renaming of its files is left.
        """
        content = {
            "format": _FORMAT,
            "complete": complete and complete.bin_sha256,
            "options": self._request.options,
            "inputs": self._request.inputs,
            "here": asdict(self._here),
            "fallback": asdict(self._fallback),
        }
        fresh = temporary(self.path)
        with writing(self.path):
            with fresh.open("w", encoding="utf-8") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)

    def remove(self) -> None:
        """The corpus is whole."""
        with writing(self.path):
            self.path.unlink(missing_ok=True)
            temporary(self.path).unlink(missing_ok=True)

    def begin(self, token_size: int) -> Beginning:
        """Where to begin; ``token_size``: bytes of a token in the .bin."""
        if not os.path.lexists(self.path):
            return Beginning()
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["format"] != _FORMAT:
                return Beginning(refused="its journal is of another version")
            here, fallback = _mark(saved["here"]), _mark(saved["fallback"])
            beginning = self._choose(saved, here, fallback)
            complete = saved["complete"] if beginning.is_complete else None
            is_held = beginning.refused or self._holds(beginning.mark, token_size, complete=complete)
        except (ValueError, KeyError, TypeError, OSError, DataError) as error:
            return Beginning(refused=f"its journal cannot be read ({error!r})")
        if not is_held:
            return Beginning(refused="its temporary files are gone or cut short")
        self._here = beginning.mark
        self._fallback = fallback if beginning.mark == here else beginning.mark
        return beginning

    def _choose(self, saved: dict[str, Any], here: Mark, fallback: Mark) -> Beginning:
        options, inputs = dict(saved["options"]), saved["inputs"]
        if options != self._request.options:
            now = self._request.options
            names = [name for name in {**options, **now} if options.get(name) != now.get(name)]
            return Beginning(refused=f"{', '.join(sorted(names))} changed")
        if saved["complete"] and inputs == self._request.inputs:
            return Beginning(here, is_complete=True)
        current = self._request.inputs
        for mark in (here, fallback):
            # Files that are not begun may change; with offset 0 the place is before its file.
            used = mark.place.file + (mark.place.offset > 0)
            if mark != Mark() and inputs[:used] == current[:used]:
                return Beginning(mark)
        changed = next(str(old[0]) for old, new in zip(inputs, [*current, [""]], strict=False) if old != new)
        return Beginning(refused=f"{changed} is not what it was")

    def _holds(self, mark: Mark, token_size: int, *, complete: str | None) -> bool:
        """Whether what the journal speaks of is on the disk."""
        written = mark.written
        if complete:
            return self._is_whole(written.tokens * token_size, complete)
        if not written.tokens:
            return True
        sizes = (written.tokens * token_size, written.sentences * 4, written.documents * 8 + 8)
        paths = temporary_paths(self._prefix)
        return all(path.is_file() and path.stat().st_size >= size for path, size in zip(paths, sizes, strict=True))

    def _is_whole(self, bin_size: int, bin_sha256: str) -> bool:
        """Whether all three files of the corpus are there, under their last names or before they get them."""
        files = [path if not temporary(path).exists() else temporary(path) for path in corpus_paths(self._prefix)]
        if not all(path.is_file() for path in files):
            return False
        return files[0].stat().st_size == bin_size and CorpusFacts.read(files[2]).bin_sha256 == bin_sha256


def _mark(content: Mapping[str, Any]) -> Mark:
    return Mark(
        Place(**content["place"]),
        Written(**content["written"]),
        Tally(**content["tally"]),
        InputCounts(**content["counts"]),
    )
