"""How parameters are split over the tensor axis, declared once beside the layer that relies on it.

A layer class carries ``SHARDINGS = {"weight": Sharding(dim=0)}``, and its instances say the whole (logical)
shapes in ``full_shapes``.  `parts` turns a module into the list of named rectangles that this rank holds;
initialisation, import, export, checkpoints and the gradient norm all read that list and nothing else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from megatron_bert_tp.parallel.mesh import Axis


@dataclass(frozen=True)
class Sharding:
    """Split of one parameter: along ``dim``, or whole on every rank (None).

    ``blocks`` names the tensors that are stacked along dim 0 of a fused parameter; each is split by itself.
    ``over_sequence`` says that the parameter, whole on every rank, is applied to hidden states that sequence
    parallelism splits: then the gradient of a rank is that of its own tokens, and one of a sum.
    """

    dim: int | None = None
    blocks: tuple[str, ...] = ()
    over_sequence: bool = False


@dataclass(frozen=True)
class Part:
    """The rectangle of one named tensor that this rank holds, and where it lies in a parameter.

    ``shape`` is the whole tensor without padding, split over ``axis`` along ``dim``; the rectangle has the size
    ``local_shape`` and begins at ``offsets`` in it, and at ``row`` of the parameter's dim 0.  ``most_rows`` is
    what the fullest rank of the axis holds of dim 0.  ``alias_of`` names the tensor of which this is a second
    copy (tied embeddings); ``over_sequence`` is that of `Sharding`.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local_shape: tuple[int, ...]
    dim: int | None
    row: int
    most_rows: int
    axis: Axis
    alias_of: str | None = None
    over_sequence: bool = False

    @property
    def source(self) -> str:
        """Name of the tensor whose values these are: its own, or that of the original of a tied copy."""
        return self.alias_of or self.name

    @property
    def is_counted_here(self) -> bool:
        """Whether this rank answers for the tensor in sums and files: one copy of each does."""
        return self.alias_of is None and (self.dim is not None or self.axis.is_first)

    def view(self, like: Tensor) -> Tensor:
        """The rectangle inside ``like``, a tensor of the parameter's shape (its gradient)."""
        for dim, size in enumerate(self.local_shape):
            like = like.narrow(dim, self.row if dim == 0 else 0, size)
        return like

    def cut(self, whole: Tensor) -> Tensor:
        """The rectangle inside the whole tensor of shape ``shape``."""
        for dim, (start, size) in enumerate(zip(self.offsets, self.local_shape, strict=True)):
            whole = whole.narrow(dim, start, size)
        return whole

    def rows_of_owner(self, num_owners: int) -> int:
        """Rows of one owner when they are shared out: the same on every rank of the axis."""
        return -(-self.most_rows // num_owners)

    def owned_by(self, owner: int, num_owners: int) -> "Part":
        """The rows of the rectangle for which one of ``num_owners`` answers, in even shares but for the last.

        Owner ``r`` has the rows ``r * ceil(n / num_owners)`` to ``(r + 1) * ceil(n / num_owners)`` of ``n``, as
        far as there are so many here: the last owners may have fewer, or none.
        """
        num_rows, *others = self.local_shape
        share = self.rows_of_owner(num_owners)
        first = min(owner * share, num_rows)
        rows = min(share, num_rows - first)
        offsets = (self.offsets[0] + first, *self.offsets[1:])
        return replace(self, offsets=offsets, local_shape=(rows, *others), row=self.row + first)


def padded_share(size: int, axis: Axis, *, multiple: int = 8) -> int:
    """Rows per rank when ``size`` rows need not divide: rounded up, to a multiple that suits the hardware.

    An axis of one rank holds just what there is.
    """
    if axis.size == 1:
        return size
    share = -(-size // axis.size)
    return -(-share // multiple) * multiple


def parts(module: nn.Module, axis: Axis, aliases: Mapping[str, str] | None = None) -> list[Part]:
    """Every named rectangle that ``module`` holds on this rank of ``axis``, in the order of its parameters."""
    aliases = aliases or {}
    return [
        part for path, layer in module.named_modules() for part in _parts_of_layer(path, layer, axis, aliases)
    ]


def _parts_of_layer(path: str, layer: nn.Module, axis: Axis, aliases: Mapping[str, str]) -> Iterator[Part]:
    shardings: Mapping[str, Sharding] = getattr(layer, "SHARDINGS", {})
    full_shapes: Mapping[str, tuple[int, ...]] = getattr(layer, "full_shapes", {})
    for key, parameter in layer.named_parameters(recurse=False):
        sharding = shardings.get(key, Sharding())
        shape = full_shapes.get(key, tuple(parameter.shape))
        for index, name in enumerate(_names(path, key, sharding.blocks)):
            rows = parameter.shape[0] // max(1, len(sharding.blocks))
            held = (rows, *parameter.shape[1:])
            offsets, local_shape = _extent(sharding.dim, shape, held, axis)
            yield Part(
                name,
                parameter,
                shape,
                offsets,
                local_shape,
                dim=sharding.dim,
                row=index * rows,
                most_rows=min(rows, shape[0]),
                axis=axis,
                alias_of=aliases.get(name),
                over_sequence=sharding.over_sequence,
            )


def _names(path: str, key: str, blocks: tuple[str, ...]) -> list[str]:
    """Names of what a parameter consists of; a block takes the place of the fused layer's own name."""
    if not blocks:
        return [f"{path}.{key}" if path else key]
    parent = path.rpartition(".")[0]
    return [".".join(filter(None, (parent, block, key))) for block in blocks]


def _extent(
    split: int | None, shape: tuple[int, ...], held: tuple[int, ...], axis: Axis
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First index and size of the logical entries of ``shape`` among the ``held`` ones, padding included."""
    starts = tuple(min(axis.rank * held[dim], shape[dim]) if dim == split else 0 for dim in range(len(shape)))
    sizes = tuple(
        min(held[dim], shape[dim] - starts[dim]) if dim == split else shape[dim] for dim in range(len(shape))
    )
    return starts, sizes
