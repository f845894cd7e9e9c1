"""One model out of the parts of all tensor ranks, of which a rectangle at a time is in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.tensor_file import read_in_blocks
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.megatron.gather import Gathered, Shards
from megatron_bert_tp.formats.megatron.names import BLOCKS, COPY, FUSED, TOKEN_TYPES, WORDS, split_dim
from megatron_bert_tp.formats.megatron.qkv import Order, blocks_of
from megatron_bert_tp.formats.stored_tensors import StoredTensor
from megatron_bert_tp.model.shape import HEADS, Head, ModelShape, tensor_shapes

_MOST_LINES = 20
_BINARY_HEAD = ("bert.pooler.", "cls.seq_relationship.")


@dataclass(frozen=True)
class MergedModel:
    """A `Reader` of the whole model under Hugging Face's names, with all rows of the vocabulary."""

    shape: ModelShape
    head: Head
    order: Order
    _shards: Shards = field(repr=False)
    _tensor: int

    @classmethod
    def of(cls, gathered: Gathered, shape: ModelShape, order: Order, *, tensor: int, source: str) -> "MergedModel":
        """Model of these tensors; FormatError lists all that are missing, too many, misshapen or at odds."""
        binary = any(name.startswith(_BINARY_HEAD) for name in gathered.shards)
        head = HEADS["MegatronBertForPreTraining" if binary else "MegatronBertForMaskedLM"]
        if shape.num_attention_heads % tensor:
            raise FormatError(
                f"{source}: {shape.num_attention_heads} attention heads cannot lie on {tensor} tensor ranks; give "
                "the right number with --num-attention-heads"
            )
        model = cls(shape, head, order, gathered.shards, tensor)
        lines = [*(f"  unexpected: {line}" for line in gathered.unexpected), *model._problems()]
        if lines:
            more = [f"  and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
            title = f"{source}: its tensors are not those of a BERT of Megatron-LM:"
            raise FormatError("\n".join([title, *lines[:_MOST_LINES], *more]))
        return model

    def read(self, name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """Rectangle of a tensor, in the number format of the file."""
        if name == TOKEN_TYPES and name not in self._shards:
            return torch.zeros(extent, dtype=self._shards[WORDS][0].dtype)
        fused, block = _fused(name)
        if block is None:
            return self._joined(name, offsets, extent)
        whole = self._block(fused, block)
        return whole[tuple(slice(first, first + size) for first, size in zip(offsets, extent, strict=True))]

    def _block(self, fused: str, block: int) -> Tensor:
        """Query, key or value of one layer."""
        num_heads = self.shape.num_attention_heads // self._tensor
        parts = [_whole(self._shards[fused][rank]) for rank in range(self._tensor)]
        return torch.cat([blocks_of(part, self.order, num_heads=num_heads)[block] for part in parts])

    def _joined(self, name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """Rectangle of a tensor that ranks share along one dimension, or that each has whole."""
        parts, dim = self._shards[name], split_dim(name)
        if dim is None:
            return parts[0].read(offsets, extent)
        share = parts[0].shape[dim]
        pieces = []
        for rank in range(offsets[dim] // share, (offsets[dim] + extent[dim] - 1) // share + 1):
            begin = max(offsets[dim], rank * share)
            end = min(offsets[dim] + extent[dim], (rank + 1) * share)
            first = (*offsets[:dim], begin - rank * share, *offsets[dim + 1 :])
            pieces.append(parts[rank].read(first, (*extent[:dim], end - begin, *extent[dim + 1 :])))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def _problems(self) -> Iterator[str]:
        expected = fused_shapes(self.shape, self.head)
        if TOKEN_TYPES not in self._shards:
            del expected[TOKEN_TYPES]
        yield from (f"  missing: {name}" for name in sorted(expected.keys() - self._shards.keys()))
        allowed = {**expected, COPY: expected[WORDS]}
        yield from (f"  unexpected: {name}" for name in sorted(self._shards.keys() - allowed.keys()))
        misfits = {name: list(self._misfits(name, allowed[name])) for name in allowed if name in self._shards}
        yield from (line for lines in misfits.values() for line in lines)
        fitting = [name for name, lines in misfits.items() if not lines]
        yield from (line for name in fitting if split_dim(name) is None for line in self._disagreements(name))
        if COPY in fitting and WORDS in fitting and not self._is_same(COPY, WORDS, allowed[WORDS]):
            yield f"  {COPY}: the last stage's copy differs from {WORDS}"

    def _misfits(self, name: str, shape: tuple[int, ...]) -> Iterator[str]:
        """What is wrong with the parts of a tensor by their headers."""
        parts, dim = self._shards[name], split_dim(name)
        share = tuple(size // self._tensor if axis == dim else size for axis, size in enumerate(shape))
        for rank in range(self._tensor):
            if rank not in parts:
                yield f"  missing: {name} on tensor rank {rank}"
            elif parts[rank].shape != share:
                yield f"  {name} has the shape {parts[rank].shape} on tensor rank {rank}, but must have {share}"
        kinds = sorted({part.kind for part in parts.values()})
        if len(kinds) > 1:
            yield f"  {name} has other number formats on other ranks: {', '.join(kinds)}"

    def _disagreements(self, name: str) -> Iterator[str]:
        parts = self._shards[name]
        first = _whole(parts[0])
        for rank in range(1, self._tensor):
            if not _is_equal(first, _whole(parts[rank])):
                yield f"  {name} differs on tensor ranks 0 and {rank}, which must hold the same"

    def _is_same(self, one: str, other: str, shape: tuple[int, ...]) -> bool:
        pairs = zip(
            read_in_blocks(self._joined, one, shape), read_in_blocks(self._joined, other, shape), strict=True
        )
        return all(_is_equal(mine, theirs) for mine, theirs in pairs)


def fused_shapes(shape: ModelShape, head: Head) -> dict[str, tuple[int, ...]]:
    """Whole shape of every tensor, with query, key and value as one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, size in tensor_shapes(shape, head).items():
        fused, block = _fused(name)
        shapes[fused] = size if block is None else (3 * size[0], *size[1:])
    return shapes


def _fused(name: str) -> tuple[str, int | None]:
    """Name of the tensor that holds ``name``, and which of its three blocks that is."""
    for number, block in enumerate(BLOCKS):
        if f".attention.self.{block}." in name:
            return name.replace(f"attention.self.{block}", FUSED), number
    return name, None


def _whole(part: StoredTensor) -> Tensor:
    return part.read((0,) * len(part.shape), part.shape)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are the same, those of what is no number too."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
