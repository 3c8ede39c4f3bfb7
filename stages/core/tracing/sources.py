"""Plain networks -> sources: traced, compared with each other and verified."""

import logging
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from stages.core.graph.compare import always_shared, check_alike
from stages.core.graph.source import Source, Task, trace_among
from stages.core.runtime.errors import some
from stages.core.tracing.known import read_known
from stages.core.tracing.verify import verify

log = logging.getLogger(__name__)


def make_sources(
    networks: Sequence[nn.Module], tasks: Sequence[Task], example: Tensor, labels: str
) -> list[Source]:
    """Trace and verify networks of one architecture, as ``traced_sources``.

    labels: shared or separate. Raises InputError naming the first thing that differs.
    """
    return traced_sources(networks, tasks, example, lambda sources: check_alike(sources, labels))


def traced_sources(
    networks: Sequence[nn.Module],
    tasks: Sequence[Task],
    example: Tensor,
    check: Callable[[Sequence[Source]], None] = lambda _: None,
) -> list[Source]:
    """Trace networks of one task each, check them, and verify the first one's trace.

    example: (n, ...) images, on whose device the sources will be.
    """
    sources: list[Source] = []
    readings = []
    for network, task in zip(networks, tasks, strict=True):
        readings.append(reading := read_known(network, example))
        state = {name: tensor.detach().to(example.device) for name, tensor in reading.state(network).items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        trace = trace_among(sources, reading.graph, shapes, example[:1].shape, reading.place_of)
        sources.append(Source(trace, state, task))
    check(sources)
    if found := always_shared(sources):
        log.warning(
            "%s: differ between the networks, but act on units that keep their order (of the input, of the logits); "
            "shared at every budget",
            some(found),
        )
    verify(networks[0], sources[0].trace, example[:2].cpu(), state_of=readings[0].state)
    return sources
