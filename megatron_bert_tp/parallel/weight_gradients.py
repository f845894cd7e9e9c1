"""Weight gradients of linear layers, computed in the backward pass or put off to a pass of their own.

A pipeline can fill its idle time with them: no other stage waits for them (Qi et al. 2023, "Zero Bubble
Pipeline Parallelism", section 2).  The input pass computes what the stage before waits for, and with it the
gradients of LayerNorms, embeddings and the small linear layers of heads; the weight pass the large products.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

Work = Callable[[], None]
Gradients = tuple[Tensor | None, ...]


def add_to_grad(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add ``gradient`` to ``parameter.grad`` as autograd does, with the same bits."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


class WeightGradients:
    """Weight-gradient products of linear layers, done at once or put off to a later pass (Qi et al. 2023).

    One object for each stage, of which all its linear layers know.  ``deliver`` takes the finished gradients of
    what was put off; those of a joint backward go the way of autograd.
    """

    def __init__(self, deliver: Callable[[nn.Parameter, Tensor], None] = add_to_grad) -> None:
        self.deliver = deliver
        self._later: list[Work] | None = None

    @contextmanager
    def put_off(self) -> Iterator[list[Work]]:
        """Inside, backwards of linear layers leave weights and biases out and append that work to the list.

        Calling the entries in order, after as many other passes as one likes, computes and delivers the
        gradients; each holds the input and the output's gradient of its layer, and nothing of the graph.  Where
        the sequence is split an entry sends messages: all tensor ranks must call them in the same order.
        """
        before, self._later = self._later, []
        try:
            yield self._later
        finally:
            self._later = before

    @property
    def is_put_off(self) -> bool:
        """Whether a backward now leaves weights and biases out."""
        return self._later is not None

    def of(self, parameters: Sequence[nn.Parameter | None], compute: Callable[[], Gradients]) -> Gradients:
        """Gradients of ``parameters`` by ``compute``; or None for each, and ``compute`` is called later.

        A place in ``parameters`` is None where no gradient is needed.
        """
        if all(parameter is None for parameter in parameters):
            return (None,) * len(parameters)
        if self._later is None:
            return compute()
        self._later.append(partial(self._finish, parameters, compute))
        return (None,) * len(parameters)

    def _finish(self, parameters: Sequence[nn.Parameter | None], compute: Callable[[], Gradients]) -> None:
        with torch.no_grad():
            for parameter, gradient in zip(parameters, compute(), strict=True):
                if parameter is not None and gradient is not None:
                    self.deliver(parameter, gradient)
