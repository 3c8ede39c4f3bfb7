"""Calls that have no rule, written as calls that have: by what torch itself decomposes them to."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.fx
from torch._decomp import decomposition_table
from torch.export import ExportedProgram

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
ROUNDS = 8  # what a call is decomposed to may have to be decomposed again


def decomposed(program: ExportedProgram, has_rule: Callable[[torch.fx.Node], bool]) -> ExportedProgram:
    """Decompose the calls on values that have no rule, where all parts have one; the reader refuses the others."""
    without = _without(program, has_rule)
    found = _written(program, without, has_rule)
    if not without or not _without(found, has_rule):
        return found
    fit = {
        call
        for call in without
        if not _without(_written(program, {call}, has_rule), has_rule) - (without - {call})
    }
    return _written(program, fit, has_rule)


def _written(
    program: ExportedProgram, calls: set[Any], has_rule: Callable[[torch.fx.Node], bool]
) -> ExportedProgram:
    """Calls, and what they are decomposed to, decomposed as far as torch knows how."""
    left = _without(program, has_rule) - calls
    for _ in range(ROUNDS):
        table = {call: _decomposition(call) for call in calls}
        table = {call: own for call, own in table.items() if own is not None}
        if not table:
            break
        left |= table.keys()
        program = program.run_decompositions(table)
        calls = _without(program, has_rule) - left
    return program


def _without(program: ExportedProgram, has_rule: Callable[[torch.fx.Node], bool]) -> set[Any]:
    """Calls of torch on values that have no rule."""
    return {
        node.target
        for node in _on_values(program)
        if isinstance(node.target, torch._ops.OpOverload) and not has_rule(node)
    }


def _decomposition(call: torch._ops.OpOverload) -> Callable[..., Any] | None:
    if COMPOSITE in call.py_kernels:
        return call.py_kernels[COMPOSITE]
    if call.has_kernel_for_dispatch_key(COMPOSITE):
        return partial(
            call._op_dk, COMPOSITE
        )  # not call.decompose, which torch.export replaces by what is given here
    return decomposition_table.get(call)


def _on_values(program: ExportedProgram) -> list[torch.fx.Node]:
    """Calls that depend on the input; what depends on parameters and constants alone is folded anyway."""
    given = set(program.graph_signature.user_inputs)
    held: set[torch.fx.Node] = set()
    for node in program.graph_module.graph.nodes:
        if node.name in given or any(own in held for own in node.all_input_nodes):
            held.add(node)
    return [node for node in held if node.op == "call_function"]
