"""Memory of a fit as the system sees it, against what was predicted, in a process of its own."""

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, re, sys
from pathlib import Path
import torch, torchvision
from stages import merge
from stages.core.runtime.device import prepare
from stages.core.sweep.sweep import Sweep
from stages.core.sweep import memory

prepare("cpu", 1)
torch.manual_seed(0)
networks = {name: torchvision.models.resnet18(num_classes=5) for name in "ab"}
images = {name: [torch.randn(4, 3, 224, 224) for _ in range(2)] for name in "ab"}
storage, name = sys.argv[1], {"memory": "peak_bytes", "disk": "disk_peak_bytes"}[sys.argv[1]]
found, run, predict = {}, Sweep.run, getattr(memory, name)

def resident(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watched(self, visitor, progress=None):
    if type(visitor).__name__ != "FitVisitor":
        return run(self, visitor, progress)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS") - sum(batch.images.nbytes for batch in self.batches if batch.at_hand)
    run(self, visitor, progress)
    found["used"] = resident("VmHWM") - before

def predicted(*arguments):
    found["predicted"] = predict(*arguments)
    return found["predicted"]

Sweep.run = watched
setattr(memory, name, predicted)
merge(networks, images, 1.2, options={"storage": storage, "memory": 3.0}, progress=False)
print(json.dumps(found))
"""


LIBRARY = 128 << 20  # bytes: packed weights and scratch space of convolutions, whatever the number of images


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_a_fit_at_224_pixels_takes_the_memory_that_was_predicted(storage):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, storage], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    # memory that the process has kept from before is used again, and does not show; of files the system counts pages
    # too, which it takes back when it needs them; what the convolution library keeps depends on the processor
    above = {"memory": 1.05, "disk": 1.5}[storage] * found["predicted"] + LIBRARY
    assert 0.8 * found["predicted"] < found["used"] < above, found
