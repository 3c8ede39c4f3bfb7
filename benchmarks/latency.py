"""Tables of measured latency: python -m benchmarks latency [NAME ...] [--batch N ...] [--budget B ...] [--onnx]

Sources and merged networks of every form take turns in one process; the shortest time of each counts. Networks have
random weights and the images are noise, which take the time that others do. Run it on a quiet machine.
"""

import platform
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from benchmarks.pairs import PAIRS, Pair, networks
from stages.allocate.solve import check_budget
from stages.api import merge
from stages.core.merged.cost import built_cost, source_cost
from stages.core.merged.network import MergedNetwork
from stages.core.merged.tuning import fastest
from stages.own.parser import Parser
from stages.report.export import export

LATENCY = {
    "resnet20": (PAIRS["resnet20"], (1, 64)),
    "resnet18": (Pair(lambda: torchvision.models.resnet18(num_classes=2), (3, 224, 224), 2), (1, 8)),
    "resnet50": (PAIRS["resnet50"], (1, 8)),
}  # and the numbers of images at a time
BUDGETS = (1.0, 1.2, 1.46, 1.71, 2.0)
LAYOUTS = ("blocks", "dense")
LAST = torch.channels_last
HEAD = (
    "| network, images | budget | form | counted (x) | executed (x) | latency (x one source) | "
    "(x both sources) | (x both, batch norms folded) | (and channels last) |"
)


@dataclass(frozen=True)
class Form:
    """A way to run a merged network. counted, executed: multiply-accumulates relative to one source."""

    budget: float
    name: str
    counted: float
    executed: float
    run: Callable[[Tensor], Any]


def main(words: Sequence[str]) -> None:
    parser = Parser(prog="python -m benchmarks latency", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(LATENCY)}; all if none")
    parser.add_argument("--batch", type=int, nargs="+", help="images at a time; as usual if not given")
    parser.add_argument("--budget", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--onnx", action="store_true", help="in onnxruntime, against one source")
    given = parser.parse_args(words)
    unknown = [name for name in given.names if name not in LATENCY]
    if unknown or min(given.repeats, given.threads, *(given.batch or [1])) < 1:
        parser.error(f"found {unknown or 'a number below 1'}; allowed: {', '.join(LATENCY)}, numbers from 1")
    for budget in given.budget:
        check_budget(budget, 2, dense=False)
    torch.set_num_threads(given.threads)
    say(f"{platform.machine()}, {given.threads} threads, torch {torch.__version__}")
    say(
        "| network, images | budget | form | onnxruntime (x one source) |\n|---|---|---|---|"
        if given.onnx
        else HEAD
    )
    say("" if given.onnx else "|" + "---|" * 9)
    for name in given.names or LATENCY:
        pair, batches = LATENCY[name]
        made, merges = networks(pair), merged_networks(pair, given.budget)
        for batch in given.batch or batches:
            x = torch.randn(batch, *pair.image, generator=torch.Generator().manual_seed(0))
            table = in_onnxruntime if given.onnx else in_torch
            for line in table(made, merges, x, given):
                say(f"| {name}, {batch} | {line} |")


def say(line: str) -> None:
    if line:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def merged_networks(pair: Pair, budgets: tuple[float, ...]) -> dict[tuple[float, str], MergedNetwork]:
    """By budget and layout, all of the same pair."""
    made = networks(pair)
    images = {name: [torch.randn(4, *pair.image)] for name in made}
    return {
        (budget, layout): merge(
            made, images, budget, {"fit": {"solver": "average"}, "match": {"by": "identity"}, "recalibrate": "none"},
            options={"allocate": {"layout": layout, "multiple": 8 if layout == "dense" else 1}}, progress=False,
        )
        for budget in budgets
        for layout in LAYOUTS
    }  # fmt: skip


def forms(merges: Mapping[tuple[float, str], MergedNetwork], one: float, x: Tensor) -> list[Form]:
    """Each as tuned on x, and as a plain network with batch norms folded, channels last or not."""
    found = []
    for (budget, layout), network in merges.items():
        counted = built_cost(network, "macs") / one
        tuned = network.tune(x)
        executed = built_cost(network, "macs", executed=True) / one
        at_once = sum(layer.at_once for layer in tuned.layers)
        what = f"{at_once} of {len(tuned.layers)} layers at once" if layout == "blocks" else "layer by layer"
        what = tuned.whole or what
        found.append(Form(budget, f"{layout}, tuned: {what}", counted, executed, network))
        whole = sum(
            network.trace.positions(node) * network.map_of(node).dense_weight().numel()
            for node in network.trace.graph.nodes
            if node.linear
        )
        what, last = f"{layout}, plain and folded", network.plain(fold=True).to(memory_format=LAST)
        found.append(Form(budget, what, counted, whole / one, network.plain(fold=True)))
        found.append(Form(budget, f"{what}, channels last", counted, whole / one, partial(_last, last)))
    return found


def _last(network: nn.Module, x: Tensor) -> Tensor:
    return network(x.contiguous(memory_format=LAST))


@torch.no_grad()
def in_torch(
    made: Mapping[str, nn.Module],
    merges: Mapping[tuple[float, str], MergedNetwork],
    x: Tensor,
    given: Namespace,
) -> list[str]:
    """Rows of the table without the first cell."""
    sources, folded = list(made.values()), [fuse(network) for network in made.values()]
    last = [fuse(network).to(memory_format=LAST) for network in sources]
    one = source_cost(next(iter(merges.values())).trace, sources[0].state_dict(), "shared", "macs")
    found = forms(merges, one, x)
    runs = [
        lambda: sources[0](x),
        lambda: [own(x) for own in sources],
        lambda: [own(x) for own in folded],
        lambda: [_last(own, x) for own in last],
    ]
    single, both, light, lighter, *times = fastest(
        [*runs, *(partial(own.run, x) for own in found)], x, given.repeats
    )
    lines = [
        f"2 sources | | 2.00 | 2.00 | {both / single:.2f} | 1.00 | {both / light:.2f} | {both / lighter:.2f}"
    ]
    lines += [
        f"{form.budget:g} | {form.name} | {form.counted:.2f} | {form.executed:.2f} | {seconds / single:.2f} | "
        f"{seconds / both:.2f} | {seconds / light:.2f} | {seconds / lighter:.2f}"
        for form, seconds in zip(found, times, strict=True)
    ]
    return lines


def in_onnxruntime(
    made: Mapping[str, nn.Module],
    merges: Mapping[tuple[float, str], MergedNetwork],
    x: Tensor,
    given: Namespace,
) -> list[str]:
    """The same of exported files: one source against each merged network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "source.onnx"
        dynamic = ({0: torch.export.Dim("n", min=1)},)
        example = torch.cat([x, x])[:2]
        torch.onnx.export(
            next(iter(made.values())), (example,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False
        )
        sessions = [_session(path, given.threads)]
        for number, network in enumerate(merges.values()):
            export(network, Path(folder) / f"{number}.onnx")
            sessions.append(_session(Path(folder) / f"{number}.onnx", given.threads))
    runs = [partial(own.run, None, {own.get_inputs()[0].name: x.numpy()}) for own in sessions]
    one, *times = fastest(runs, x, given.repeats)
    return [
        f"{budget:g} | {layout} | {seconds / one:.2f}"
        for (budget, layout), seconds in zip(merges, times, strict=True)
    ]


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
