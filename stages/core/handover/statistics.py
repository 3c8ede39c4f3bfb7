"""The moments that the statistics stage leaves."""

from pathlib import Path

from stages.core.runtime.files import read_tensors
from stages.core.runtime.reading import left_by
from stages.core.settings.params import Params
from stages.core.units.moments import Origin, Statistics, from_tensors, pool

MOMENTS = Path("models/statistics/moments.safetensors")


def load_statistics(params: Params, data: Origin) -> Statistics:
    """What the statistics stage found, pooled over the tasks' own images or over the proxy's."""
    tasks = len(params.active.tasks)
    with left_by("statistics", MOMENTS):
        found = from_tensors(read_tensors(MOMENTS)[0])
        if not any(found.values()):
            raise LookupError("no moments")
        return pool(found, tasks, tasks, data)
