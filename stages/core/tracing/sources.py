"""Plain networks -> sources: traced, compared with each other and verified."""

from collections.abc import Sequence

from torch import Tensor, nn

from stages.core.graph.compare import check_alike
from stages.core.graph.source import Source, Task
from stages.core.tracing.trace import trace
from stages.core.tracing.verify import verify


def make_sources(
    networks: Sequence[nn.Module], tasks: Sequence[Task], example: Tensor, labels: str
) -> list[Source]:
    """Trace and verify networks of one architecture.

    example: (n, ...) images, on whose device the sources will be. labels: shared or separate. Raises InputError naming
    the first thing that differs.
    """
    sources = []
    for network, task in zip(networks, tasks, strict=True):
        state = {name: tensor.detach().to(example.device) for name, tensor in network.state_dict().items()}
        sources.append(Source(trace(network, example), state, task))
    check_alike(sources, labels)
    verify(networks[0], sources[0].trace, example[:2].cpu())
    return sources
