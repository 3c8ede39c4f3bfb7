"""All that ranks do together, by as many as are asked for.

python together.py RANKS FILE [some | killed | refused | wrong]
"""

import os
import signal
import time

import torch
from conftest import Small, _randomise

from stages.core.graph.source import Task
from stages.core.recipe.methods import Fit
from stages.core.runtime import ranks
from stages.core.runtime.command import command
from stages.core.runtime.device import prepare
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import write_tensors
from stages.core.runtime.spread import spread
from stages.core.sweep.batches import images_to_batches
from stages.core.tracing.sources import make_sources
from stages.core.units.matching import full_split, identity_matching
from stages.fit.network import fit_network
from stages.recalibrate.recalibrate import recalibrate
from stages.statistics.moments import gather

FITS = {
    "source": {},
    "merged": {"inputs": "merged", "targets": "own", "norm": "fold"},
    "regmean": {"solver": "regmean"},
    "adam": {"solver": "adam", "inputs": "merged", "steps": 5, "batch_size": 3},
    "refined": {
        "solver": "average",
        "refine": {"steps": 4, "images": 40, "batch_size": 6, "every": 2, "shift": 1},
    },
}


class Late:
    """Images that are made when they are asked for, as those of a file are."""

    def __init__(self, seed):
        self.images = torch.randn(
            41, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, chosen):
        return self.images[chosen]


def end(way):
    """Of one rank, while the other goes on."""
    os.write(1, str(time.time()).encode())
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"refused": InputError("images: found none"), "wrong": ZeroDivisionError("ours")}[way]


def merged(sources, labels, batches, pools, fit):
    spec = sources[0].trace.spec
    split = full_split(spec, {name: range(group.size // 2) for name, group in spec.free.items()})
    network, record = fit_network(
        sources, identity_matching(spec, 2), split, batches, Fit(**fit), labels=labels, precision=torch.float64,
        unlabelled=[own.images for own in pools],
    )  # fmt: skip
    return network, record


def main(count, path, *rest):
    spread(int(count))
    prepare("cpu", 1)
    pools, found = [Late(0), Late(1)], {}
    batches = images_to_batches(pools, 8)
    networks = [_randomise(Small(3, False), seed) for seed in (0, 1)]
    tasks = [Task(name, ("0", "1", "2")) for name in "ab"]
    some = rest == ("some",)
    if rest and not some and ranks.rank() == 1:
        end(*rest)
    for labels, fits in (("separate", ["refined"]), ("shared", ["merged"] if some else list(FITS))):
        sources = make_sources(networks, tasks, torch.zeros(2, 2, 8, 8, dtype=torch.float64), labels)
        for name in fits:
            fit = FITS[name]
            network, record = merged(sources, labels, batches, pools, fit)
            found |= {f"{labels} {name} {key}": own for key, own in network.state_dict().items()}
            if "refine" in fit:
                curve = network.about["refined"]["curve"]
                found[f"{labels} {name} curve"] = torch.tensor(curve, dtype=torch.float64)
            if record:
                found[f"{labels} {name} residual"] = torch.tensor(
                    [line.residual for line in record], dtype=torch.float64
                )
    for way in ("batchnorm", "repair", "tact"):
        network, _ = merged(sources, labels, batches, pools, {"solver": "average"})
        recalibrate(network, way, batches, sources)
        found |= {f"{way} {key}": own for key, own in network.state_dict().items()}
    for group, own in gather(sources, batches, precision=torch.float64)["after"].items():
        found[f"moments {group}"] = own.second
    if ranks.rank() == 0:
        write_tensors(path, found)


if __name__ == "__main__":
    command(main, "ranks", "file", "...")
