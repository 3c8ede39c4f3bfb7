"""A trace is verified before it is used: it computes what the module does, and its groups are groups."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stages.core.graph.nodes import Graph
from stages.core.graph.operations import run_graph
from stages.core.graph.trace import Trace
from stages.core.runtime.errors import InputError
from stages.core.runtime.surroundings import users_code
from stages.core.tracing.copies import copied, unwrap
from stages.core.tracing.reading import Reading, read
from stages.core.units.groups import permute


def verify(
    module: nn.Module,
    traced: Trace,
    example: Tensor,
    tolerance: float = 1e-8,
    state_of: Callable[[nn.Module], dict[str, Tensor]] | None = None,
) -> None:
    """Gate: the graph computes what the module does, and each group permuted at random leaves the outputs alone.

    Runs in float64 on perturbed weights, so that a branch that is switched off cannot hide an error.
    example: (n, ...). state_of: a module's tensors as the graph has them (``Reading.state``), by default read again
    where its state dict is not all there is. Raises InputError naming the group that fails.
    """
    generator = torch.Generator().manual_seed(0)
    if state_of is None:
        whole = traced.parameters.keys() <= unwrap(module).state_dict().keys()
        state_of = (lambda own: dict(own.state_dict())) if whole else read(module, example).state
    with torch.no_grad():
        state, x, expected = _perturbed_run(module, traced.graph, example, state_of, generator)
        if not _runs_as(traced.graph, state, x, expected, tolerance):
            again = torch.Generator().manual_seed(0)
            *_, other = _perturbed_run(module, traced.graph, example, state_of, again)
            raise InputError(
                f"{type(module).__name__}: "
                + (
                    "the traced graph does not compute what the module does"
                    if other.equal(expected)
                    else "gives other numbers each time for the same images in evaluation mode; allowed: dropout and "
                    "noise in training alone (F.dropout(x, training=self.training))"
                )
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


def _runs_as(graph: Graph, state: dict[str, Tensor], x: Tensor, expected: Tensor, tolerance: float) -> bool:
    with contextlib.suppress(RuntimeError):  # of another number of images than the graph was made of
        return _close(run_graph(graph, state, x), expected, tolerance)
    return False


def computes(module: nn.Module, reading: Reading, example: Tensor, tolerance: float = 1e-8) -> bool:
    """Whether a module computes what a reading says, on perturbed weights in float64."""
    try:
        generator = torch.Generator().manual_seed(0)
        state, x, expected = _perturbed_run(module, reading.graph, example, reading.state, generator)
        return _close(run_graph(reading.graph, state, x), expected, tolerance)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return False  # another forward: it is read anew


def _perturbed_run(
    module: nn.Module,
    graph: Graph,
    example: Tensor,
    state_of: Callable[[nn.Module], dict[str, Tensor]],
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Tensors, images and what the module makes of them."""
    module = copied(unwrap(module)).cpu()
    kind = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    module = module.double()
    for own in (*module.parameters(), *module.buffers()):
        own.data = own.data.to(torch.complex128) if own.is_complex() else own.data
    x = _images(example, graph, generator)
    for name, tensor in _distinct(module):
        tensor.copy_(_perturbed(name, tensor, generator))
    state = {name: tensor.detach().clone() for name, tensor in state_of(module).items()}
    with (
        users_code(
            f"{type(module).__name__}, verified in double precision,",
            "a forward that takes its weights' type",
        ),
        _Double(),
        _Smallest(kind),
    ):
        return state, x, module(x)


class _Double(TorchDispatchMode):
    """A forward that names a type (`x.float()` before a norm, `torch.zeros(n, h)`) has double in its place."""

    LESS = (torch.float32, torch.float16, torch.bfloat16)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        made = not any(isinstance(own, Tensor) for own in torch.utils._pytree.tree_leaves((args, kwargs)))
        if not made and kwargs.get("dtype") in (*self.LESS, torch.complex64):
            kwargs["dtype"] = torch.float64 if kwargs["dtype"] in self.LESS else torch.complex128
        found = func(*args, **kwargs)
        if made and isinstance(found, Tensor) and found.dtype in (*self.LESS, torch.complex64):
            return found.to(
                torch.complex128 if found.is_complex() else torch.float64
            )  # of its single precision
        return found


class _Smallest(TorchFunctionMode):
    """An RMSNorm that is given no epsilon takes that of its numbers' type: of the network's, not of double."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = kwargs.get("eps", args[3] if len(args) > 3 else None)
        if getattr(func, "__name__", "") == "rms_norm" and given is None:
            args, kwargs = args[:3], {**kwargs, "eps": torch.finfo(self.kind).eps}
        return func(*args, **kwargs)


def _images(example: Tensor, graph: Graph, generator: torch.Generator) -> Tensor:
    if graph.nodes[0].attributes.get("integers"):
        return example.cpu()
    return torch.randn(example.shape, generator=generator, dtype=torch.float64)


def _distinct(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of a module, those of several names once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict().items():
        found.setdefault(tensor.data_ptr() or id(tensor), (name, tensor))
    return list(found.values())


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
    if a.shape != b.shape:
        return False
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))
