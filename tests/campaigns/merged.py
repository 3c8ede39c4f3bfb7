"""Merged files: damaged by accident, and written with a right seal by somebody who knows the format.

Good: refused in one line, or the network that was saved; of a file with a right seal, a network that runs on its own
example, gives finite numbers or refuses to.
"""

import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
from styles import STYLES

from stages.core.graph.source import Task
from stages.core.merged.file import load_merged
from stages.core.merged.network import MergedNetwork
from stages.core.merged.seal import SEAL, seal_of
from stages.core.runtime.files import read_tensors, write_tensors
from stages.core.tracing.trace import trace
from tests.campaigns.nasty import VALUES, spoilt
from tests.campaigns.rule import Bad, damaged, held

KINDS = ("residual", "squeeze and excite", "grouped", "attention")


@functools.cache
def saved(style: str, folder: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A file, an input and the output."""
    make, shape = STYLES[style]
    torch.manual_seed(0)
    x = torch.randint(0, 11, (2, *shape)) if len(shape) == 1 else torch.randn(2, *shape, dtype=torch.float64)
    traced = trace(make().double().eval(), x)
    half = {name: group.size // 2 for name, group in traced.spec.free.items()}
    network = MergedNetwork(traced, [Task(n, ("0", "1", "2")) for n in "ab"], "shared", half).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-0.5, 0.5)
        path = folder / f"{abs(hash(style))}.safetensors"
        network.save(path)
        return path, x, network(x)


def trial(draw: random.Random, folder: Path) -> str:
    """One case; what became of it."""
    path, x, expected = saved(draw.choice([s for s in STYLES if s in KINDS] or list(STYLES)), folder)
    target = folder / "case.safetensors"
    if draw.random() < 0.5:
        target.write_bytes(damaged(draw, path.read_bytes()))
        outcome, found = held(lambda: load_merged(target))
        if outcome == "read":
            with torch.no_grad():
                if not torch.equal(found(x), expected):
                    raise Bad("damaged, and read as another network")
        return outcome
    _write_spoilt(draw, path, target)
    outcome, found = held(lambda: load_merged(target))
    if outcome == "read":
        with torch.no_grad():
            outcome, found = held(lambda: _run(found, x))
    return outcome


def _write_spoilt(draw: random.Random, path: Path, target: Path) -> None:
    tensors, metadata = read_tensors(path)
    header: Any = json.loads(metadata["merged"])
    del tensors[SEAL]
    for _ in range(draw.choice([1, 1, 2, 5])):
        if draw.random() < 0.7:
            header = spoilt(draw, header)
        else:
            name = draw.choice(sorted(tensors))
            tensors[name] = draw.choice(
                [lambda t: t.float(), lambda t: t.long(), lambda t: -t, lambda t: t * float("nan"), lambda t: t[:1],
                 lambda t: t.flatten(), lambda t: t * 1e300, lambda t: torch.zeros(0, dtype=t.dtype)]
            )(tensors[name])  # fmt: skip
    if draw.random() < 0.05:
        header = draw.choice(VALUES)
    text = json.dumps(header)
    write_tensors(target, {**tensors, SEAL: seal_of(text, tensors)}, {"merged": text})


def _run(network: MergedNetwork, x: torch.Tensor) -> torch.Tensor:
    shape = network.trace.shapes[network.trace.graph.nodes[0].name]
    own = x if shape[1:] == x.shape[1:] else torch.zeros(shape, dtype=x.dtype)
    task = network.tasks[0].name if network.corrected or network.labels == "separate" else None
    return network(own, task)
