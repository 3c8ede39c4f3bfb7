"""How a merged network runs fastest: measured, on the device at hand.

Convolutions of a few channels cost as much as those of eight or sixteen, so that blocks pay only where layers are wide:
layers may run as one dense layer each. The whole may run with its batch norms folded, with the channels of its values
last or not: in its blocks, or, where all are narrow, as an ordinary network.
"""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.graph.inputs import as_taken
from stages.core.graph.nodes import Node
from stages.core.merged.blocks import BlockMap
from stages.core.merged.plain import foldable_norms, with_norm
from stages.core.runtime.errors import InputError

logger = logging.getLogger(__name__)

REPEATS = 10  # of each way to run a layer; the shortest counts
ENOUGH = 5.0  # seconds of one comparison
GAIN = 0.97  # of the time of blocks: what is no faster than that stays as it is


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer in blocks and as one dense layer, and whether it runs so now."""

    layer: str
    blocks: float
    dense: float
    at_once: bool


@dataclass(frozen=True)
class Tuning:
    """seconds: of a forward pass in blocks and as tuned. layers: those of several blocks. whole: "" where layers run by
    themselves, else the form in which all of them do, such as "in blocks, channels last" (``FOLDED_FORMS``)."""

    layers: tuple[LayerTime, ...]
    seconds: tuple[float, float]
    whole: str = ""


ORDINARY, BLOCKS = "as an ordinary network", "in blocks"
FOLDED_FORMS = {  # batch norms folded in all
    f"{kind}, {memory}": (kind, layout)
    for kind, (memory, layout) in product(
        (ORDINARY, BLOCKS),
        {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}.items(),
    )
}


class Folded:
    """A merged network with its batch norms folded (``FOLDED_FORMS``), made anew when a tensor of it has changed."""

    def __init__(self, network: nn.Module, form: str) -> None:
        self.network = network
        self.kind, self.memory = FOLDED_FORMS[form]
        self._made: tuple[list[tuple[int, int]], nn.Module] | None = None
        modules = list(network.modules())
        self._places = [(own._parameters, name) for own in modules for name in own._parameters]
        self._places += [(own._buffers, name) for own in modules for name in own._buffers]

    @property
    def dense(self) -> bool:
        """Whether it multiplies by the zeros between blocks."""
        return self.kind == ORDINARY

    def __call__(self, x: Tensor, task: int | None) -> Tensor:
        """As the network: x (n, ...), the logits of all heads or of one task's."""
        tensors = [tensors[name] for tensors, name in self._places]
        state = [
            (own.data_ptr(), 0 if own.is_inference() else own._version) for own in tensors if own is not None
        ]
        if self._made is None or self._made[0] != state:
            made = self.network.plain(fold=True) if self.dense else fold_blocks(self.network)
            self._made = state, made.to(memory_format=self.memory)
        found = self._made[1](x.contiguous(memory_format=self.memory))
        if task is None:
            return found
        widths = [len(own.classes) for own in self.network.tasks]
        trace = self.network.trace
        return found.narrow(trace.layouts[trace.graph.output.name].dim, sum(widths[:task]), widths[task])


def layer_by_layer(network: nn.Module) -> nn.Module:
    """A merged network whose layers run by themselves, and multiply as they do in the form that was found fastest."""
    if network.instead is None:
        return network
    made = copy.deepcopy(network)
    if network.instead.dense:
        for own in made.maps.values():
            if isinstance(own, BlockMap):
                own.at_once = len(own.blocks) > 1
    return made


def fold_blocks(network: nn.Module) -> nn.Module:
    """A copy of a merged network that runs in the same blocks, without the batch norms that fold into them."""
    made = copy.deepcopy(network)
    for name, norm in foldable_norms(network).items():
        blocks, biases = made.maps[f"{name}_"], []
        for block, weight in zip(blocks.blocks, blocks.weights, strict=True):
            rows = slice(block.start, block.stop)
            bias = None if blocks.bias is None else blocks.bias[rows]
            weight.data, bias = with_norm(made.map_of(norm), weight, bias, rows)
            biases.append(bias)
        blocks.bias = nn.Parameter(torch.cat(biases))
        made.folded.add(norm.name)
    return made


@torch.no_grad()
def tune(network: nn.Module, example: Tensor) -> Tuning:
    """Decide for each layer, then for all of them together and for the whole: what makes it no faster is undone."""
    if not isinstance(example, Tensor):
        raise InputError(f"example: found {type(example).__name__}; allowed: a tensor of images")
    first = network.trace.graph.nodes[0].name
    if example.shape[1:] != network.trace.shapes[first][1:] or not len(example):
        shape = ("n", *network.trace.shapes[first][1:])
        raise InputError(f"example: found shape {tuple(example.shape)}; allowed: {shape}, n from 1")
    as_taken(network.trace, example, next(network.parameters()))  # before anything is undone
    training = [module for module in network.modules() if module.training]
    network.eval()
    network.untune()
    layers: list[LayerTime] = []

    def look(node: Node, inputs: Sequence[list[Tensor]]) -> None:
        if node.linear and len(network.map_of(node).blocks) > 1:
            layers.append(_layer(network.map_of(node), node, inputs[0]))

    told = 0 if network.corrected else None
    stop = network.head if network.labels == "separate" else None
    network._run(example, stop, told, look)
    task = network.tasks[0].name if network.corrected else None
    chosen = [m for m in network.maps.values() if isinstance(m, BlockMap) and m.at_once]
    seconds = fastest(
        [(lambda on=on: _with(network, chosen, on, example, task)) for on in (False, True)], example
    )
    if not seconds[1] < seconds[0]:
        network.untune()
        layers, seconds = (
            [LayerTime(own.layer, own.blocks, own.dense, False) for own in layers],
            seconds[:1] * 2,
        )
    whole = ""
    if not network.corrected:
        made: dict[str, Folded] = {}
        for form, (kind, memory) in FOLDED_FORMS.items():
            own = Folded(network, form)
            if (kind == BLOCKS and not layers and made) or (
                memory == torch.channels_last and example.dim() != 4
            ):
                continue  # of one block each an ordinary network is the same
            if _runs(own, example):
                made[form] = own
        runs = [partial(own, example, None) for own in made.values()]
        tuned, *times = fastest([partial(network, example, task), *runs], example)
        best = min(range(len(times)), key=times.__getitem__, default=None)
        if best is not None and times[best] < GAIN * tuned:
            whole = list(made)[best]
            network.instead, seconds = made[whole], (seconds[0], seconds[1] * times[best] / tuned)
    for module in training:
        module.training = True
    return Tuning(tuple(layers), tuple(seconds), whole)


def _runs(folded: Folded, example: Tensor) -> bool:
    try:
        folded(example, None)
    except InputError as error:  # of a module path that torch.fx keeps for itself
        logger.info("tune: %s it does not run: %s", folded.kind, error)
        return False
    return True


def _layer(module: BlockMap, node: Node, pieces: list[Tensor]) -> LayerTime:
    def run(at_once: bool) -> list[Tensor]:
        module.at_once = at_once
        return module.on_pieces(pieces)

    blocks, dense = fastest([lambda: run(False), lambda: run(True)], pieces[0])
    module.at_once = dense < GAIN * blocks
    if not module.at_once:
        module._made = None
    return LayerTime(node.path, blocks, dense, module.at_once)


def _with(
    network: nn.Module, chosen: Sequence[BlockMap], on: bool, example: Tensor, task: str | None
) -> Tensor:
    for module in chosen:
        module.at_once = on
    return network(example, task)


def fastest(runs: Sequence[Callable[[], Any]], like: Tensor, repeats: int = REPEATS) -> list[float]:
    """The shortest time of each, in seconds; they alternate, and the first two of each warm up and are left out.

    Of what takes long, fewer than ``repeats`` are enough, down to two.
    """
    times: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    for repeat in range(repeats + 2):
        for run, own in zip(runs, times, strict=True):
            own.append(timed(run, like))
        if repeat >= 3 and time.perf_counter() - start > ENOUGH:
            break
    return [min(own[2:]) for own in times]


def timed(run: Callable[[], Any], like: Tensor) -> float:
    """Seconds of one run, on the device of ``like``."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    start = time.perf_counter()
    run()
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter() - start
