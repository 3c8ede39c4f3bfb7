"""One pair, in a process of its own: JSON on standard output. python -m benchmarks.one NAME IMAGES"""

import json
import resource
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.clock import Clock, matmul_peak
from benchmarks.pairs import PAIRS, batches, networks
from stages import api
from stages.core.graph.source import Source
from stages.core.merged.network import MergedNetwork
from stages.core.runtime.device import generator, prepare
from stages.core.sweep.maps import MapSums
from stages.fit.equations.normal import NormalEquations
from stages.fit.equations.rows import RowEquations
from stages.fit.solvers import exact
from stages.given import checked_batches
from stages.match import assign, weights
from stages.match.gains import Gains
from stages.statistics import moments

STAGES = {
    "gather": "statistics",
    "make_matching": "match",
    "split_units": "allocate",
    "fit_network": "fit",
    "recalibrate_network": "recalibrate",
}


def timed() -> Clock:
    """A clock on the stages of a merge and on what they do."""
    clock = Clock()
    for name, stage in STAGES.items():
        clock.stage(api, name, stage)
    for owner in (Source, MergedNetwork):
        clock.kind(owner, "run_node", "forward")
    for owner, name in (
        (MapSums, "add"), (NormalEquations, "add"), (RowEquations, "add"), (moments, "add_gram"), (moments, "add_pairs"),
        (Gains, "of")
    ):  # fmt: skip
        clock.kind(owner, name, "products")
    for owner, name in (
        (MapSums, "finish"), (exact, "decide"), (exact, "solve"), (assign, "linear_sum_assignment")
    ):  # fmt: skip
        clock.kind(owner, name, "solve")
    return clock


def measure(name: str, images: int | None) -> dict:
    """Merge one pair at 1x by the default method, then match it by weights; then count the operations of both."""
    prepare("cpu", 1)
    pair = PAIRS[name]
    made, data, peak = networks(pair), batches(pair, images or pair.images), matmul_peak()
    clock = timed()
    api.merge(made, data, 1.0, progress=False)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found, _ = checked_batches(made, data, None)
    sources, _ = api._sources(made, found, None, None)
    clock.stage(weights, "match_weights", "match by weights")
    states = [source.state for source in sources]
    weights.match_weights(sources[0].trace.spec, states, generator(0))
    seconds: dict[str, dict[str, float]] = {}
    for (stage, kind), spent in clock.seconds.items():
        if stage:
            seconds.setdefault(stage, {})[kind] = spent
    merge = sum(sum(own.values()) for stage, own in seconds.items() if stage != "match by weights")
    with FlopCounterMode(display=False) as counter:
        api.merge(made, data, 1.0, progress=False)
    return {
        "name": name, "images": images or pair.images, "seconds": seconds, "peak": peak, "memory": memory,
        "operations": counter.get_total_flops(), "merge": merge, "torch": torch.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    given = sys.argv[2] if len(sys.argv) > 2 else "0"
    sys.stdout.write(json.dumps(measure(sys.argv[1], int(given) or None)) + "\n")
