"""Whether ranks that hold the same values hold the same bits: what memory or a device has flipped is found.

Equal on all data ranks are the parameters, and their masters and moments where the optimizer is not sharded; on
all tensor ranks whatever is not split over them; on both ends of a pipeline the tied word embeddings.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bert_tp.errors import RanksDifferError
from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.optim.rules import moment_of
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.collectives import gather_over
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.parallel.ownership import is_master
from megatron_bert_tp.parallel.sharding import Part
from megatron_bert_tp.training.update import Updater

_PIECE = 1 << 15  # words; what is multiplied stays in a core's cache
_PIECES_AT_ONCE = {"cpu": 1, "cuda": 512}
_WORD = 4
_MOST_TOLD = 5  # tensors in a message
_NOT_HELD = "-"


@dataclass(frozen=True)
class Held:
    """Values that other ranks hold too, under the same ``name``; ``axes`` are those over which they are equal."""

    name: str
    tensor: Tensor
    axes: tuple[Axis, ...]


def check_replicas(chunks: Chunks, updater: Updater, mesh: ParallelMesh, agreement: Agreement) -> None:
    """RanksDifferError, the same on all ranks, where copies differ in any bit; every rank must call it.

    Where more than half of the copies are equal, the ranks with others are named; else all.  One message over each
    axis with 8 bytes for each tensor, and one number of all ranks.
    """
    held = list(held_by_several(chunks, updater, mesh))
    device = next(chunks[0].parameters()).device
    weights = odd_weights(device)
    sums = {each.name: checksum(each.tensor, weights) for each in held}
    differing = sorted({n for axis in (mesh.data, mesh.tensor, mesh.tied) for n in _differing(held, sums, axis)})
    if agreement.maximum([len(differing)])[0]:
        raise RanksDifferError(_finding(differing, sums, agreement))


def held_by_several(chunks: Chunks, updater: Updater, mesh: ParallelMesh) -> Iterator[Held]:
    """All values of this rank that must be equal to those of others, in the same order on all that hold them."""
    seen: set[int] = set()
    for part in chunks.parts():
        rows = part.view(part.parameter.detach())
        # The second leaf of a tied weight on this rank is the same memory.
        if rows.data_ptr() not in seen:
            yield from _held("parameter", part, rows, _axes(part, chunks, mesh, is_on_all_data_ranks=True))
        seen.add(rows.data_ptr())
    kinds = updater.optimizer.param_groups[0]["kinds"]
    for owned in updater.weights.owned:
        is_whole = not updater.weights.is_sharded
        axes = _axes(owned.part, chunks, mesh, is_on_all_data_ranks=is_whole)
        if is_master(owned):
            yield from _held("float32 weight", owned.part, owned.weight, axes)
        for kind in kinds:
            yield from _held(f"moment {kind}", owned.part, moment_of(updater.optimizer, kind)(owned), axes)


def checksum(tensor: Tensor, weights: Tensor) -> Tensor:
    """A 64-bit sum of the bytes of ``tensor``, int64 ``[]`` on its device; all arithmetic is modulo 2^64.

    Words of 32 bits are added, each times an odd number that belongs to its place in a piece: one flipped bit
    changes the sum by an odd number times a power of two below 2^32, so always.  Sums of pieces are scrambled,
    together with their places, by a one-to-one function before they are added.  That exchanged or shifted values
    go unnoticed has a chance of 2^-32 at most.
    """
    words = _words(tensor)
    num_whole = len(words) // _PIECE * _PIECE
    at_once = _PIECES_AT_ONCE.get(tensor.device.type, 1)
    sums = [(run * weights).sum(1) for run in words[:num_whole].view(-1, _PIECE).split(at_once)]
    rest = words[num_whole:]
    sums.append((rest * weights[: len(rest)]).sum().view(1))
    pieces = torch.cat(sums)
    return _scrambled(pieces + torch.arange(1, len(pieces) + 1, device=pieces.device) * _GOLDEN).sum()


def odd_weights(device: torch.device) -> Tensor:
    """``[32768]`` int64: an odd number without any pattern for each place in a piece, as `checksum` needs them."""
    places = torch.arange(1, _PIECE + 1)
    return (_scrambled(places * _GOLDEN) | 1).to(device)


def _held(kind: str, part: Part, tensor: Tensor, axes: tuple[Axis, ...]) -> Iterator[Held]:
    if axes and tensor.numel():
        place = f" from row {part.offsets[0]}" if part.offsets[0] else ""
        column = f" from column {part.offsets[1]}" if len(part.offsets) > 1 and part.offsets[1] else ""
        yield Held(f"{kind} {part.source}{place}{column}", tensor, axes)


def _axes(part: Part, chunks: Chunks, mesh: ParallelMesh, *, is_on_all_data_ranks: bool) -> tuple[Axis, ...]:
    """Axes of more than one rank over which a part is the same."""
    tied = chunks.tied()
    is_tied = tied is not None and (part.parameter is tied.lookup or part.parameter is tied.projection)
    alike = ((mesh.data, is_on_all_data_ranks), (mesh.tensor, part.dim is None), (mesh.tied, is_tied))
    return tuple(axis for axis, is_alike in alike if is_alike and axis.size > 1)


def _differing(held: Sequence[Held], sums: Mapping[str, Tensor], axis: Axis) -> list[str]:
    """Names of what this rank and another one of ``axis`` hold differently."""
    names = [each.name for each in held if any(own is axis for own in each.axes)]
    if not names:
        return []
    own = torch.stack([sums[name] for name in names])
    rows = gather_over(own, axis, dim=0).view(axis.size, -1)
    return [name for name, differs in zip(names, (rows != rows[0]).any(0).tolist(), strict=True) if differs]


def _finding(differing: Sequence[str], sums: Mapping[str, Tensor], agreement: Agreement) -> str:
    """What differs, by the votes of all that hold it; the same text on all ranks."""
    lists = agreement.texts("\n".join(differing[:_MOST_TOLD]) or None)
    names = sorted({name for text in lists if text is not None for name in text.split("\n")})[:_MOST_TOLD]
    own = [f"{sums[name].item():x}" if name in sums else _NOT_HELD for name in names]
    votes = [(text or "").split("\n") for text in agreement.texts("\n".join(own))]
    verdicts = [
        _verdict(name, {rank: row[place] for rank, row in enumerate(votes) if row[place] != _NOT_HELD})
        for place, name in enumerate(names)
    ]
    return (
        f"ranks that must hold the same values do not: {'; '.join(verdicts)}. Memory or a device has failed: "
        "start again without the hosts of these ranks; what was saved was compared before it was saved"
    )


def _verdict(name: str, holders: Mapping[int, str]) -> str:
    """Who is wrong: those that differ from more than half of the holders."""
    (most, num_equal), *_ = Counter(holders.values()).most_common()
    if 2 * num_equal <= len(holders):
        return f"{name} differs between {_ranks(holders)}, of which none has a majority"
    odd = [rank for rank, value in holders.items() if value != most]
    return f"{name} of {_ranks(odd)} differs from that of {_ranks(rank for rank in holders if rank not in odd)}"


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _words(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as a row of int32, filled up with zeros."""
    row = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if len(row) % _WORD or row.storage_offset() % _WORD:
        row = torch.cat([row, row.new_zeros(-len(row) % _WORD)])
    return row.view(torch.int32)


def _scrambled(values: Tensor) -> Tensor:
    """A one-to-one function of 64 bits each of whose bits depends on all: the finish of SplitMix64."""
    for shift, factor in _ROUNDS:
        # torch shifts the sign in, which would not be one-to-one.
        values = (values ^ (values >> shift & (1 << 64 - shift) - 1)) * factor
    return values ^ (values >> _LAST_SHIFT & (1 << 64 - _LAST_SHIFT) - 1)


def _signed(bits: int) -> int:
    """64 bits as torch has them."""
    return bits - (1 << 64) if bits >> 63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))
_LAST_SHIFT = 31
