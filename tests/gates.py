"""The hard gates on one network, whatever its family, and what is said of it in docs/families.md."""

import itertools
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.allocate.splits import split_units
from stages.core.align.order import align
from stages.core.graph.compare import always_shared
from stages.core.graph.source import Source, Task
from stages.core.graph.trace import Trace
from stages.core.merged.cost import built_cost, split_cost
from stages.core.merged.file import load_merged
from stages.core.merged.network import MergedNetwork
from stages.core.recipe.sections import AllocateSection
from stages.core.tracing.known import read_known
from stages.core.tracing.trace import lay_out
from stages.core.tracing.verify import verify
from stages.core.units.groups import permute
from stages.core.units.matching import Matching, full_split, identity_matching
from stages.fit.average import fill_average
from stages.fit.network import build
from stages.match.weights import match_weights

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """What docs/families.md says of a network. seconds: of the processor, for trace, verify, match by
    weights and allocate at 1.3."""

    millions: float
    groups: int
    units: int
    whole: str
    seconds: tuple[float, ...] = ()


def example(shape: Shape, images: int = 2) -> Tensor:
    """Images, or integers where the shape is that of a text."""
    generator = torch.Generator().manual_seed(5)
    if len(shape) == 1:
        return torch.randint(0, 11, (images, *shape), generator=generator)
    return torch.randn(images, *shape, generator=generator)


@torch.no_grad()
def trained(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network none of whose tensors is as it was initialised: branches that start at zero would hide errors."""
    torch.manual_seed(seed)
    network = make().eval()
    generator = torch.Generator().manual_seed(100 + seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            scale = 0.1 * tensor.square().mean().sqrt() if bool(tensor.any()) else 0.05
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
        if name.endswith("running_var"):
            tensor.abs_().add_(0.1)
    return network


def check(make: Callable[[], nn.Module], shape: Shape) -> Row:
    """All gates, in float64; the time is that of the network as it is.

    Raises AssertionError where one fails, InputError where the network is refused.
    """
    first, x = trained(make, 0), example(shape)
    clock = [time.process_time()]
    reading = read_known(first, x)
    state = reading.state(first)
    shapes = {n: tuple(t.shape) for n, t in state.items()}
    traced = lay_out(reading.graph, shapes, x[:1].shape, reading.place_of)
    clock.append(time.process_time())
    verify(first, traced, x, state_of=reading.state)
    millions = sum(p.numel() for p in first.parameters()) / 1e6
    del first
    clock.append(time.process_time())
    other = reading.state(trained(make, 1))
    classes = tuple(map(str, range(traced.layouts[traced.graph.output.name].width)))
    a, b = (Source(traced, own, Task(n, classes)) for n, own in (("a", state), ("b", other)))
    between = time.process_time()
    match_weights(traced.spec, [state, other], torch.Generator().manual_seed(0))
    clock.append(clock[-1] + time.process_time() - between)
    between = time.process_time()
    splits, allocation, base = split_units(a, benefits(traced), 1.3, 2, "shared", AllocateSection())
    clock.append(clock[-1] + time.process_time() - between)
    a, b = (replace(s, state={n: double(t) for n, t in s.state.items()}) for s in (a, b))
    x = double(x[:1])
    assert traced.spec.free, "nothing may be separate"
    copies_merge_to_the_network(a, x, splits, allocation.cost)
    assert allocation.cost <= 1.3 * base
    # Else some outputs are in an order of their own, and shared at every budget.
    if not always_shared([a, b]):
        separate_gives_both(a, b, x, 2 * base)
    seconds = tuple(stop - start for start, stop in itertools.pairwise(clock))
    units = sum(group.size for group in traced.spec.free.values())
    return Row(round(millions, 1), len(traced.spec.free), units, stays_whole(traced), seconds)


def double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def benefits(traced: Trace) -> dict[str, Tensor]:
    """Of separating each unit: drawn at random, which makes the splits as ragged as they can be."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.rand(group.size, generator=generator, dtype=torch.float64)
        for name, group in traced.spec.free.items()
    }


def permuted(first: Source, seed: int = 0) -> tuple[Source, Matching]:
    """A copy with its units in other orders, and the matching that undoes it."""
    spec, generator = first.trace.spec, torch.Generator().manual_seed(seed)
    orders = {g: torch.randperm(v.size, generator=generator) for g, v in spec.free.items()}
    units = {g: torch.stack([torch.arange(len(o)), o.argsort()]) for g, o in orders.items()}
    for name, inner in spec.inner.items():
        rows = [torch.randperm(inner.size, generator=generator) for _ in range(inner.parts)]
        orders[name] = torch.stack(rows)
        undone = orders[inner.outer].argsort() if inner.outer in orders else torch.arange(inner.parts)
        plain = torch.arange(inner.size).repeat(inner.parts, 1)
        units[name] = torch.stack([plain, orders[name][undone].argsort(-1)])
    like = {g: torch.ones(u.shape).double() for g, u in units.items()}
    state = permute(first.state, spec, orders)
    return Source(first.trace, state, Task("b", first.task.classes)), Matching(units, like)


def averaged(sources, matching, splits, labels="shared") -> MergedNetwork:
    aligned = align(sources, matching, splits)
    network = build(aligned, matching, splits, labels, {}).eval()
    fill_average(network, aligned)
    return network


@torch.no_grad()
def copies_merge_to_the_network(a: Source, x: Tensor, splits, promised: int) -> None:
    """At 1.0 and at an allocated budget; there the cost is what was promised, and a file gives the network back."""
    (b, matching), expected = permuted(a), a(x)
    same(averaged([a, b], matching, full_split(a.trace.spec))(x), expected, "at 1.0")
    network = averaged([a, b], matching, splits)
    found = network(x)
    same(found, expected, "at 1.3")
    assert built_cost(network, "macs") == promised
    with tempfile.TemporaryDirectory() as folder:
        network.save(Path(folder) / "merged")
        again = load_merged(Path(folder) / "merged")
    assert torch.equal(again(x), found), "a saved network computes something else"


@torch.no_grad()
def separate_gives_both(a: Source, b: Source, x: Tensor, promised: int) -> None:
    """At N the sources side by side: what the last linear map reads and, with a head each, the logits."""
    spec, graph = a.trace.spec, a.graph
    split = full_split(spec, dict.fromkeys(spec.free, ()))
    matching = identity_matching(spec, 2)
    network = averaged([a, b], matching, split)
    shared = {group: len(own.shared) for group, own in split.items()}
    counted = split_cost(a.trace, a.state, "shared", "macs", shared, 2)
    assert built_cost(network, "macs") == counted <= promised  # products of the input alone are made once
    name = next(node for node in reversed(graph.nodes) if node.fitted).inputs[0]
    found, dim = value(network, x, name), a.trace.layouts[name].dim
    for source, positions in zip((a, b), network.arrangement(name).positions, strict=True):
        same(found.index_select(dim, positions), value(source, x, name), "at 2.0")
    if graph.head is not None:
        network = averaged([a, b], matching, split, "separate")
        for source in (a, b):
            same(network(x, task=source.task.name), source(x), f"the logits of {source.task.name}")


def value(network: Source | MergedNetwork, x: Tensor, name: str) -> Tensor:
    """One value of a network, node by node."""
    graph = network.graph if isinstance(network, Source) else network.trace.graph
    values, last = {graph.nodes[0].name: x}, graph.last_uses()
    for node in graph.nodes[1:]:
        if name in values:
            break
        values[node.name] = network.run_node(node, [values[own] for own in node.inputs])
        for own in last[node.name]:
            if own != name:
                del values[own]
    return values[name]


def same(found: Tensor, expected: Tensor, what: str) -> None:
    assert torch.isfinite(expected).all(), f"{what}: the network itself is not finite"
    apart = float((found - expected).abs().max() / (1 + expected.abs().max()))
    assert apart < 1e-8, f"{what}: {apart:.1e} apart"


def stays_whole(traced: Trace) -> str:
    """What may not be cut: parts of several units, maps behind a flatten, units that are shared at any size."""
    spec, said = traced.spec, []
    free, inner = spec.free, spec.inner.values()
    parts = {
        name: max(i.size for i in inner if i.outer == name) for name in {i.outer for i in inner} & set(free)
    }
    if parts:
        few, most = min(parts.values()), max(parts.values())
        said.append(f"parts of {few if few == most else f'{few} to {most}'} units ({len(parts)} groups)")
    maps = {
        span.block
        for group in free.values()
        for span in group.spans
        if span.block > 1 and group.name not in parts and span.axis.parameter.endswith("weight")
    }
    if maps:
        said.append(f"units of {', '.join(map(str, sorted(maps)))} entries of one dimension")
    ends = {
        s.group for n in (traced.graph.nodes[0], traced.graph.output) for s in traced.layouts[n.name].segments
    }
    shared = [
        g for g in spec.groups.values() if g.fixed and g.name not in ends and g.name.rstrip("'") != "input"
    ]
    if shared:
        said.append(f"always shared: {', '.join(f'{g.name} ({g.size})' for g in shared)}")
    return "; ".join(said)


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
