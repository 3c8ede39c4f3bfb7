"""What a traced forward computes beside tensors of images: shapes and numbers, seen in two small runs.

A number that is the same for two batch sizes does not depend on the batch, so it may be written into the graph.
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor

BATCHES = (2, 3)


class Observed:
    """What the nodes of a torch.fx graph gave. ``failed``: the node that could not run, and ``error`` why."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.failed: torch.fx.Node | None = None
        self.error = ""

    def shape(self, fx: torch.fx.Node) -> tuple[Any, ...] | None:
        """A tensor's shape, None for what is not one; "batch" stands where it depends on the batch."""
        seen = [run.get(fx.name) for run in self.runs]
        if not seen or not all(isinstance(value, _Shape) for value in seen):
            return None
        if len({len(value.shape) for value in seen}) > 1:
            return ("batch",)
        return tuple(_entry([value.shape[i] for value in seen]) for i in range(len(seen[0].shape)))

    def tensor(self, fx: torch.fx.Node) -> bool:
        """Whether a node gives one tensor. A node that could not run counts, so that it is read and named."""
        return self.shape(fx) is not None or fx is self.failed

    def number(self, fx: torch.fx.Node) -> Any:
        """The number (or shape, or None) a node gives when it is the same for any batch, else the node."""
        seen = [run.get(fx.name, fx) for run in self.runs]
        if any(isinstance(value, _Shape | torch.fx.Node) for value in seen) or not seen:
            return fx
        same = all(type(value) is type(seen[0]) and value == seen[0] for value in seen)
        return seen[0] if same else fx


class _Shape:
    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


def _entry(sizes: list[int]) -> int | str:
    if len(set(sizes)) == 1:
        return sizes[0]
    return "batch" if tuple(sizes) == BATCHES else f"{'/'.join(map(str, sizes))}"


class _Observer(torch.fx.Interpreter):
    def __init__(self, traced: torch.fx.GraphModule, observed: Observed) -> None:
        super().__init__(traced)
        self.observed, self.seen = observed, observed.runs[-1]
        self.extra_traceback = False

    def run_node(self, fx: torch.fx.Node) -> Any:
        try:
            value = super().run_node(fx)
        except (
            Exception
        ) as error:  # whatever a forward raises is about the example's shape: said by the reader
            self.observed.failed = fx
            self.observed.error = (str(error).splitlines() or [type(error).__name__])[0]
            raise
        self.seen[fx.name] = _Shape(value.shape) if isinstance(value, Tensor) else value
        if isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
            self.seen[fx.name] = None
        return value


@torch.no_grad()
def observe(traced: torch.fx.GraphModule, example: Tensor) -> Observed:
    """Run the graph on zeros of the example's shape with two batch sizes."""
    like = next((p for p in traced.parameters() if p.is_floating_point()), example)
    observed = Observed()
    for n in BATCHES:
        observed.runs.append({})
        x = torch.zeros(n, *example.shape[1:], dtype=like.dtype, device=like.device)
        try:
            _Observer(traced, observed).run(x)
        except Exception:
            if observed.failed is None:
                raise
            observed.runs = observed.runs[:1]
            break
    return observed
