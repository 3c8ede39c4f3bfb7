"""torch module -> Trace."""

from torch import Tensor, nn

from stages.core.graph.trace import Trace, lay_out
from stages.core.tracing.reading import read_graph


def trace(module: nn.Module, example: Tensor) -> Trace:
    """Trace a network.

    example: a batch of the input's shape, (n, ...); its values do not matter. The module is left as it is.
    Raises InputError naming the operation and the module's path when there is no rule for it.
    """
    graph = read_graph(module, example)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return lay_out(graph, shapes, example[:1].shape)
