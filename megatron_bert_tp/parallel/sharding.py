"""How parameters are split over the tensor axis, declared once beside the layer that relies on it.

A layer class carries ``SHARDINGS = {"weight": Sharding(dim=0)}``, and its instances say the whole (logical)
shapes in ``full_shapes``.  `parts` turns a module into the list of named rectangles that this rank holds;
initialisation, import, export, checkpoints and the gradient norm all read that list and nothing else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from megatron_bert_tp.parallel.mesh import Axis


@dataclass(frozen=True)
class Sharding:
    """Split of one parameter: along ``dim``, or whole on every rank (None).

    ``blocks`` names the tensors that are stacked along dim 0 of a fused parameter; each is split by itself.
    """

    dim: int | None = None
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """The rectangle of one named tensor that this rank holds, and where it lies in a parameter.

    ``shape`` is the whole tensor without padding; ``start`` and ``length`` are what is here along ``dim``
    (everything when None); ``row`` is where the block begins in the parameter's dim 0.  ``alias_of`` names
    the tensor of which this is a second copy (tied embeddings).
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    dim: int | None
    start: int
    length: int
    row: int
    axis: Axis
    alias_of: str | None = None

    @property
    def source(self) -> str:
        """Name of the tensor whose values these are: its own, or that of the original of a tied copy."""
        return self.alias_of or self.name

    @property
    def offsets(self) -> tuple[int, ...]:
        """First index of the rectangle in every dim of the whole tensor."""
        return tuple(self.start if dim == self.dim else 0 for dim in range(len(self.shape)))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Size of the rectangle in every dim."""
        return tuple(self.length if dim == self.dim else size for dim, size in enumerate(self.shape))

    @property
    def is_counted_here(self) -> bool:
        """Whether this rank answers for the tensor in sums and files: one copy of each does."""
        return self.alias_of is None and (self.dim is not None or self.axis.is_first)

    def view(self, like: Tensor) -> Tensor:
        """The rectangle inside ``like``, a tensor of the parameter's shape (its gradient, a moment)."""
        for dim, size in enumerate(self.local_shape):
            like = like.narrow(dim, self.row if dim == 0 else 0, size)
        return like

    def cut(self, whole: Tensor) -> Tensor:
        """The rectangle inside the whole tensor of shape ``shape``."""
        return whole if self.dim is None else whole.narrow(self.dim, self.start, self.length)


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
            start, length = _extent(sharding.dim, shape, rows if sharding.dim == 0 else None, parameter, axis)
            yield Part(
                name, parameter, shape, sharding.dim, start, length, index * rows, axis, aliases.get(name)
            )


def _names(path: str, key: str, blocks: tuple[str, ...]) -> list[str]:
    """Names of what a parameter consists of; a block takes the place of the fused layer's own name."""
    if not blocks:
        return [f"{path}.{key}" if path else key]
    parent = path.rpartition(".")[0]
    return [".".join(filter(None, (parent, block, key))) for block in blocks]


def _extent(
    dim: int | None, shape: tuple[int, ...], rows: int | None, parameter: nn.Parameter, axis: Axis
) -> tuple[int, int]:
    """First index and number of logical entries that this rank holds along ``dim``."""
    if dim is None:
        return 0, 0
    share = rows if rows is not None else parameter.shape[dim]
    start = min(axis.rank * share, shape[dim])
    return start, min(share, shape[dim] - start)
