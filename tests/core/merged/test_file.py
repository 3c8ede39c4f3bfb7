"""A merged file that is not what was saved: damaged by accident, or written by somebody else."""

import contextlib
import hashlib
import json
import math
import random
import time

import pytest
import torch

from stages.core.graph.source import Task
from stages.core.merged.file import load_merged
from stages.core.merged.network import MergedNetwork
from stages.core.merged.ranges import MOST_EXAMPLE, MOST_TASKS
from stages.core.merged.seal import SEAL, seal_of
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_tensors, write_tensors
from stages.core.tracing.trace import trace


@pytest.fixture(scope="module")
def whole(small, images, tmp_path_factory):
    """The path of a saved network."""
    traced = trace(small(0), images())
    shared = {name: group.size // 2 for name, group in traced.spec.free.items()}
    tasks = [Task(name, ("0", "1", "2")) for name in "ab"]
    network = MergedNetwork(traced, tasks, "shared", shared, about={"seed": 3}).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    path = tmp_path_factory.mktemp("merged") / "whole"
    network.save(path)
    return path


def changed(whole, path, change):
    """A copy of the file with a right seal, after ``change(tensors, header)``."""
    tensors, metadata = read_tensors(whole)
    header = json.loads(metadata["merged"])
    change(tensors, header)
    text = json.dumps(header)
    write_tensors(path, {**tensors, SEAL: seal_of(text, tensors)}, {"merged": text})
    return path


def refused(path, message):
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        load_merged(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300
    assert time.monotonic() - started < 10


# -- by accident ----------------------------------------------------------------------------------------------------


def test_what_is_no_file_of_a_merged_network_is_named(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "net.pth")
    with pytest.raises(InputError, match="found a folder; allowed: a file"):
        load_merged(tmp_path)
    with pytest.raises(InputError, match=r"not a whole safetensors file .*; found one of torch.save"):
        load_merged(tmp_path / "net.pth")


def test_any_flipped_bit_is_seen(whole, tmp_path):
    """Drawn at random over the whole file: header, names, types, shapes and numbers."""
    content, draw = whole.read_bytes(), random.Random(0)
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    expected = load_merged(whole)(x)
    for _ in range(150):
        bit = draw.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped").write_bytes(flipped)
        with contextlib.suppress(InputError):  # read only where what changed is a name that nobody reads
            loaded = load_merged(tmp_path / "flipped")
            assert torch.equal(loaded(x), expected)
            assert loaded.about == {"seed": 3}


def test_the_seal_is_the_hash_that_the_page_describes(whole):
    tensors, metadata = read_tensors(whole)
    digest = hashlib.sha256()
    parts = [metadata["merged"].encode()]
    for name in sorted(tensors.keys() - {"sha256"}):
        own = tensors[name]
        numbers = own.numpy().tobytes()
        parts += [name.encode(), str(own.dtype).encode(), str(tuple(own.shape)).encode(), numbers]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    assert bytes(tensors["sha256"].tolist()) == digest.digest()


def test_the_format_is_looked_at_before_the_tensors(whole, tmp_path):
    tensors, metadata = read_tensors(whole)
    header = json.loads(metadata["merged"]) | {"format": "merged-network-2"}
    write_tensors(tmp_path / "older", tensors, {"merged": json.dumps(header)})
    refused(tmp_path / "older", "'merged-network-2'; allowed: merged-network-3")


def test_a_file_without_a_seal_is_refused(whole, tmp_path):
    tensors, metadata = read_tensors(whole)
    del tensors[SEAL]
    write_tensors(tmp_path / "bare", tensors, metadata)
    refused(tmp_path / "bare", "has no sha256")


# -- written by somebody --------------------------------------------------------------------------------------------

BIAS, VARIANCE = "maps.conv4_.bias", "maps.bn1_.running_var"


def node(header, name):
    return next(own for own in header["graph"] if own["name"] == name)


RANGES = {
    "a weight of NaN": (lambda t, h: t[BIAS].fill_(math.nan), "conv4_.bias: found NaN or infinity"),
    "an endless weight": (lambda t, h: t[BIAS].fill_(math.inf), "conv4_.bias: found NaN or infinity"),
    "a negative variance": (lambda t, h: t[VARIANCE].neg_(), "running_var: found a negative variance"),
    "whole numbers as weights": (lambda t, h: t.update({BIAS: t[BIAS].long()}), "weights: found torch"),
    "single and double": (lambda t, h: t.update({BIAS: t[BIAS].float()}), "found torch.float32, torch.float64"),
    "eps of NaN": (lambda t, h: node(h, "bn1")["attributes"].update(eps=math.nan), "eps: found nan"),
    "eps of 1e30": (lambda t, h: node(h, "bn1")["attributes"].update(eps=1e30), "eps: found 1e.30; allowed"),
    "an endless eps": (lambda t, h: node(h, "bn1")["attributes"].update(eps=math.inf), "eps: found inf"),
    "no groups": (lambda t, h: node(h, "conv1")["attributes"].update(groups=0), "groups: found 0"),
    "a huge stride": (lambda t, h: node(h, "conv1")["attributes"].update(stride=[10**30, 1]), "stride: found 1e.30"),
    "a huge padding": (lambda t, h: node(h, "conv1")["attributes"].update(padding=[30000, 30000]), "numbers for one"),
    "no graph": (lambda t, h: h.update(graph=[]), "graph: found 0 nodes"),
    "no example": (lambda t, h: h.update(example=[]), "example: found"),
    "a huge example": (lambda t, h: h.update(example=[1, 2, 8000, 8000]), f"example: .*{MOST_EXAMPLE} numbers"),
    "a large example": (lambda t, h: h.update(example=[1, 2, 2800, 2800]), "cannot run on .1, 3, 700, 700"),
    "a negative example": (lambda t, h: h.update(example=[1, -2, 8, 8]), "example: found"),
    "no tasks": (lambda t, h: h.update(tasks=[]), "tasks: found 0"),
    "20,000 tasks": (
        lambda t, h: h.update(tasks=[{"name": f"t{i}", "classes": []} for i in range(20_000)]),
        f"tasks: found 20000; allowed: from 1 to {MOST_TASKS}",
    ),
    "tasks of one name": (lambda t, h: h["tasks"][1].update(name="a"), "tasks: found a, a"),
    "200 tasks": (
        lambda t, h: h.update(tasks=[{"name": f"t{i}", "classes": ["0"] * 3} for i in range(200)]),
        "shared: says",
    ),
    "classes by number": (lambda t, h: h["tasks"][1].update(classes=[0, 1, 2]), "classes by name"),
    "other labels": (lambda t, h: h.update(labels="mine"), "labels: found 'mine'"),
    "half a unit": (lambda t, h: h["shared"].update(conv1=1.5), "shared: found what is no whole number"),
    "a shape of 2 GB": (lambda t, h: h["shapes"].update({"hidden.weight": [6, 2**27]}), "shapes: says"),
    "a shape that is not there": (lambda t, h: h["shapes"].pop("conv1.weight"), "is not there"),
    "a header that is a list": (lambda t, h: h.update(shapes=[]), "file|fit together|allowed"),
    "attributes that are text": (lambda t, h: node(h, "conv1").update(attributes="x"), "allowed|fit together"),
    "no separate heads": (lambda t, h: h.update(labels="separate"), "fit together|allowed"),
}  # fmt: skip


@pytest.mark.parametrize("what", RANGES)
def test_what_no_network_says_is_refused(whole, tmp_path, what):
    change, message = RANGES[what]
    refused(changed(whole, tmp_path / "changed", change), message)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_could_not_be_read_again_is_not_written(whole, tmp_path, value):
    network = load_merged(whole)
    with torch.no_grad():
        network.get_parameter(BIAS)[0] = value
    with pytest.raises(InputError, match=r"conv4_.bias: found NaN or infinity"):
        network.save(tmp_path / "bad")
    assert not list(tmp_path.iterdir())
