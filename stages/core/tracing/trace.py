"""torch module -> Trace."""

from torch import Tensor, nn

from stages.core.graph.trace import Trace, lay_out
from stages.core.tracing.known import read_known


def trace(module: nn.Module, example: Tensor) -> Trace:
    """Trace a network.

    example: a batch of the input's shape, (n, ...); its values do not matter. The module is left as it is.
    Raises InputError naming the operation, the module's path and the user's line when there is no rule for it.
    """
    reading = read_known(module, example)
    shapes = {name: tuple(tensor.shape) for name, tensor in reading.state(module).items()}
    return lay_out(reading.graph, shapes, example[:1].shape, reading.place_of)
