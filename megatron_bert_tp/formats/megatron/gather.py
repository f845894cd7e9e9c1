"""Files of all ranks put together: which part of which tensor is where, under names of the whole model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_bert_tp.checkpoint.durable import printable
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.megatron.arguments import Sizes
from megatron_bert_tp.formats.megatron.isolated import RankContent
from megatron_bert_tp.formats.megatron.names import POSITIONS, TOKEN_TYPES, WORDS, LocalName, is_core, read_name
from megatron_bert_tp.formats.megatron.qkv import NEWEST
from megatron_bert_tp.formats.megatron.rank_files import Place, grid_size
from megatron_bert_tp.formats.stored_tensors import StoredTensor

Shards = Mapping[str, Mapping[int, StoredTensor]]
"""For every tensor, by its name in the whole model: the part of each tensor rank."""
_EMBEDDINGS = "bert.embeddings."
_FIRST_MLP = "bert.encoder.layer.0.intermediate.dense.weight"
Chunk = tuple[int, int]
"""Virtual stage and pipeline stage: layers go round the stages once for each virtual stage."""


@dataclass(frozen=True)
class Gathered:
    """The tensors of all files; ``unexpected`` says which are none of a BERT's."""

    shards: Shards
    num_layers: int
    version: float
    unexpected: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file."""

    label: str
    chunk: Chunk
    rank: int
    key: str
    tensor: StoredTensor

    @property
    def name(self) -> LocalName | None:
        return read_name(self.key)


def gather(ranks: Mapping[Place, RankContent]) -> Gathered:
    """All tensors by their names in the whole model; FormatError when two hold the same or stages are mixed up."""
    entries = [entry for place, content in ranks.items() for entry in _entries(place, content)]
    _check_stages(entries, num_stages=grid_size(ranks)[1])
    first_layers, num_layers = _first_layers(entries)
    shards: dict[str, dict[int, StoredTensor]] = {}
    for entry in entries:
        if entry.name is None:
            continue
        name = entry.name.counted_from(first_layers[entry.chunk])
        parts = shards.setdefault(name, {})
        if entry.rank in parts:
            raise FormatError(f"{entry.label}: {entry.key} is there a second time, under another name or stage")
        parts[entry.rank] = entry.tensor
    unexpected = tuple(f"{printable(entry.key)} in {entry.label}" for entry in entries if entry.name is None)
    # megatron-core's order of rows never changed, and its files may carry no version.
    version = NEWEST if any(is_core(entry.key) for entry in entries) else next(iter(ranks.values())).version
    return Gathered(shards, num_layers, version, unexpected)


def sizes_of(gathered: Gathered, *, tensor: int, source: str) -> Sizes:
    """Sizes by the tensors; FormatError when those that tell them are missing."""
    missing = [name for name in (WORDS, POSITIONS, _FIRST_MLP) if not _shape(gathered, name)[0]]
    if missing:
        strangers = "".join(f"\n  unexpected: {line}" for line in gathered.unexpected[:10])
        raise FormatError(f"{source}: is no BERT of Megatron-LM: {', '.join(missing)} not found{strangers}")
    rows, hidden = _shape(gathered, WORDS)
    return Sizes(
        rows=rows * tensor,
        hidden=hidden,
        layers=gathered.num_layers,
        intermediate=_shape(gathered, _FIRST_MLP)[0] * tensor,
        positions=_shape(gathered, POSITIONS)[0],
        types=_shape(gathered, TOKEN_TYPES)[0],
    )


def _shape(gathered: Gathered, name: str) -> tuple[int, int]:
    """Shape of a matrix on the first rank that has it; zeros where there is none."""
    part = next(iter(gathered.shards.get(name, {}).values()), None)
    return (part.shape[0], part.shape[1]) if part is not None and len(part.shape) == 2 else (0, 0)


def _entries(place: Place, content: RankContent) -> Iterator[_Entry]:
    rank, stage = place
    for stored, tensor in content.tensors.items():
        virtual, _, key = stored.partition(":")
        yield _Entry(content.label, (int(virtual), stage), rank, key, tensor)


def _check_stages(entries: list[_Entry], *, num_stages: int) -> None:
    """FormatError unless the embeddings are in the first chunk alone, and what is on the layers in the last."""
    first = (0, 0)
    last = (max((entry.chunk[0] for entry in entries), default=0), num_stages - 1)
    for entry in entries:
        if entry.name is None or entry.name.layer is not None:
            continue
        is_embedding = entry.name.rest.startswith(_EMBEDDINGS)
        if entry.chunk != (first if is_embedding else last):
            virtual, stage = entry.chunk
            home = "first" if is_embedding else "last"
            raise FormatError(
                f"{entry.label}: holds {printable(entry.key)}, which belongs to the {home} stage, but "
                f"this is pipeline stage {stage} of {num_stages} (model{virtual}); files were swapped or "
                "renamed, fetch them again"
            )


def _first_layers(entries: list[_Entry]) -> tuple[dict[Chunk, int], int]:
    """Global number of the first layer of every chunk, and the number of all layers.

    Virtual stage 0 of all stages comes first, then virtual stage 1 of all, as Megatron-LM interleaves them.
    """
    lengths: dict[Chunk, int] = {}
    for entry in entries:
        length = 0 if entry.name is None or entry.name.layer is None else entry.name.layer + 1
        lengths[entry.chunk] = max(length, lengths.get(entry.chunk, 0))
    first, total = {}, 0
    for chunk in sorted(lengths):
        first[chunk] = total
        total += lengths[chunk]
    return first, total
