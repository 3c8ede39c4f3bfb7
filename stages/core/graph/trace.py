"""nn.Module -> Graph and PermutationSpec, by torch.fx and one small rule per operation.

Nothing is guessed: a module, function or method that is not listed here is an error that names it, and a trace is
verified before it is used (``verify``).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.core.graph.layouts import Groups, Layout, Segment
from stages.core.graph.nodes import Graph, Node, node_parameters
from stages.core.graph.operations import OPERATIONS, hidden_macs, run_graph, run_node
from stages.core.graph.rules import parameter_dim
from stages.core.runtime.errors import InputError
from stages.core.tracing.reading import read_graph
from stages.core.units.groups import PermutationSpec, permute


@dataclass(frozen=True)
class Trace:
    """What is known of an architecture at one input size.

    layouts and shapes are by node name; shapes are those of one image, (1, ...). parameters: the shape of each
    tensor of the state dict.
    """

    graph: Graph
    spec: PermutationSpec
    layouts: Mapping[str, Layout]
    shapes: Mapping[str, torch.Size]
    parameters: Mapping[str, tuple[int, ...]]

    def positions(self, node: Node) -> int:
        """How often a linear map is applied to one image: its multiply-accumulates are positions * weights."""
        return self.shapes[node.name].numel() // self.layouts[node.name].width

    def hidden_macs(self, node: Node) -> int:
        """Multiply-accumulates of a node without weights (attention) per entry of its output's units."""
        return hidden_macs(node, self.shapes[node.name])

    def unit_dim(self, node: Node, role: str) -> int:
        """Which dimension of a node's parameter lies on the units of its output."""
        if role != "value" or "view" in node.attributes:
            return 0
        return parameter_dim(node, self.layouts[node.inputs[0]], self.shapes[node.inputs[0]])


def trace(module: nn.Module, example: Tensor) -> Trace:
    """Trace a network.

    example: a batch of the input's shape, (n, ...); its values do not matter. The module is left as it is.
    Raises InputError naming the operation and the module's path when there is no rule for it.
    """
    graph = read_graph(module, example)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return lay_out(graph, shapes, example[:1].shape)


@torch.no_grad()
def lay_out(graph: Graph, parameters: Mapping[str, Sequence[int]], example: Sequence[int]) -> Trace:
    """Apply every operation's rule, in order.

    parameters: the shape of each tensor of the state dict. example: the shape of one image, (1, ...).
    """
    # One zero seen as every parameter: real kernels say each value's shape, and nothing is allocated for weights.
    # (Tensors on the meta device would do too, but their first use imports a second's worth of compiler.)
    state = {name: torch.zeros(()).expand(tuple(shape)) for name, shape in parameters.items()}
    groups, last = Groups(), graph.last_uses()
    first = graph.nodes[0].name
    images = groups.new(example[1], "input")
    values = {first: torch.zeros(tuple(example))}
    shapes = {first: values[first].shape}
    layouts = {first: Layout(1, (Segment(images, example[1]),))}
    for node in graph.nodes[1:]:
        inputs = [values[name] for name in node.inputs]
        values[node.name] = out = _try_node(node, inputs, state)
        shapes[node.name] = out.shape
        rule = OPERATIONS[node.operation].rule
        read = [layouts[name] for name in node.inputs]
        layouts[node.name] = rule(groups, node, read, [value.shape for value in inputs], out.shape)
        for name in last[node.name]:
            del values[name]
    return Trace(
        graph,
        groups.spec(layouts[first], layouts[graph.output.name]),
        {name: groups.resolve(layout) for name, layout in layouts.items()},
        shapes,
        {name: tuple(shape) for name, shape in parameters.items()},
    )


def _try_node(node: Node, inputs: list[Tensor], state: Mapping[str, Tensor]) -> Tensor:
    try:
        return run_node(node, inputs, node_parameters(node, state))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
        raise InputError(
            f"{node.name}: {node.operation} cannot run on {shapes} ({str(error).splitlines()[0]}); "
            "allowed: an example of the shape that the network takes"
        ) from error


def verify(module: nn.Module, traced: Trace, example: Tensor, tolerance: float = 1e-8) -> None:
    """Gate: the graph computes what the module does, and each group permuted at random leaves the outputs alone.

    Runs in float64 on perturbed weights, so that a branch that is switched off cannot hide an error.
    example: (n, ...). Raises InputError naming the group that fails.
    """
    generator = torch.Generator().manual_seed(0)
    module = copy.deepcopy(module).cpu().double().eval()
    state = {name: _perturbed(name, tensor, generator) for name, tensor in module.state_dict().items()}
    x = torch.randn(example.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.func.functional_call(module, state, (x,), tie_weights=False)
        if not _close(run_graph(traced.graph, state, x), expected, tolerance):
            raise InputError(
                f"{type(module).__name__}: the traced graph does not compute what the module does"
            )
        orders = {n: _cycle(g.size, generator) for n, g in traced.spec.free.items()}
        for name, inner in traced.spec.inner.items():
            orders[name] = torch.stack([_cycle(inner.size, generator) for _ in range(inner.parts)])
        if _close(run_graph(traced.graph, permute(state, traced.spec, orders), x), expected, tolerance):
            return
        for name, order in orders.items():
            found = run_graph(traced.graph, permute(state, traced.spec, {name: order}), x)
            if not _close(found, expected, tolerance):
                raise InputError(f"group {name}: permuting its units changes the output; its trace is wrong")
    raise InputError("permuting all groups together changes the output; the trace is wrong")


def _cycle(size: int, generator: torch.Generator) -> Tensor:
    """A random permutation that leaves no unit in its place."""
    drawn = torch.randperm(size, generator=generator)
    order = torch.empty_like(drawn)
    order[drawn] = drawn.roll(1)
    return order


def _perturbed(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    scale = tensor.square().mean().sqrt() if tensor.numel() else torch.tensor(0.0)
    noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    moved = tensor + 0.1 * (scale + 0.1) * noise
    return moved.abs() + 0.1 if name.endswith("running_var") else moved


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))
