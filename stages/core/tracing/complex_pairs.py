"""Products with complex constants, as rotary positions are written, on the pairs of numbers they are made of.

``view_as_real(view_as_complex(x) * c)`` turns every pair of x by a constant: real parts and imaginary parts are two
values of their own, which are joined with those of the constant and stacked again.
"""

import torch
import torch.fx

from stages.core.tracing.export import opname


def pairs_apart(graph: torch.fx.Graph) -> None:
    """Rewrite a graph of ATen calls in place; what does more with complex numbers stays, and has no rule."""
    changed = False
    for node in list(graph.nodes):
        if node.op == "call_function" and opname(node) == "view_as_complex":
            products = list(node.users)
            ends = [end for product in products for end in product.users]
            if (
                all(_of_constant(product, node) for product in products)
                and ends
                and all(own.op == "call_function" and opname(own) == "view_as_real" for own in ends)
            ):
                for end in ends:
                    _write(graph, node, end)
                changed = True
    if changed:
        graph.eliminate_dead_code()


def _of_constant(node: torch.fx.Node, value: torch.fx.Node) -> bool:
    """Whether a call multiplies a value with another tensor."""
    tensors = [own for own in node.args if isinstance(own, torch.fx.Node)]
    plain = node.op == "call_function" and opname(node) == "mul" and len(node.args) == len(tensors) == 2
    return plain and tensors.count(value) == 1


def _write(graph: torch.fx.Graph, value: torch.fx.Node, end: torch.fx.Node) -> None:
    aten, pairs = torch.ops.aten, value.args[0]
    (factor,) = (own for own in end.args[0].args if own is not value)

    def call(target: object, *args: object) -> torch.fx.Node:
        found = graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda own: own.meta["val"])
        found.meta = {**end.meta, "val": target(*values)}
        return found

    with graph.inserting_before(end):
        turned = call(aten.view_as_real.default, factor)
        a, b = (call(aten.select.int, pairs, -1, i) for i in (0, 1))
        real, imaginary = (call(aten.select.int, turned, -1, i) for i in (0, 1))
        first = call(aten.sub.Tensor, call(aten.mul.Tensor, a, real), call(aten.mul.Tensor, b, imaginary))
        second = call(aten.add.Tensor, call(aten.mul.Tensor, a, imaginary), call(aten.mul.Tensor, b, real))
        found = call(aten.stack.default, [first, second], -1)
    end.replace_all_uses_with(found)
