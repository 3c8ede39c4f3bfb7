"""Small random networks and the sources made of them, all in float64."""

import copy
import random
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.core.graph.source import Task
from stages.core.tracing.sources import make_sources
from stages.core.tracing.trace import trace
from stages.core.units.groups import permute
from stages.core.units.matching import Matching, full_split


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Processes that tests start are ended by Ctrl-C, also where a shell in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Small(nn.Module):
    """A residual stream, a strided branch, a concatenation, a flatten and an MLP tail: (n, 2, 8, 8) -> (n, classes)."""

    def __init__(self, classes: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding="same", dilation=2, bias=bias)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 5, (3, 1), stride=(2, 2), padding=(1, 0), bias=bias)
        self.bn3 = nn.BatchNorm2d(5)
        self.conv4 = nn.Conv2d(9, 3, 1)
        self.hidden = nn.Linear(12, 6)
        self.fc = nn.Linear(6, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        x = torch.cat([F.max_pool2d(x, 2), F.relu(self.bn3(self.conv3(x)))], 1)
        x = torch.flatten(F.avg_pool2d(F.relu(self.conv4(x)), 2), 1)
        return self.fc(F.relu(self.hidden(x)))


def _randomise(network: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    network.double().eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.3
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return network


@pytest.fixture(scope="session")
def randomise():
    """(network, seed) -> the network in float64 and evaluation mode, every tensor random, also the statistics."""
    return _randomise


@pytest.fixture(scope="session")
def small():
    """(seed, classes, bias) -> a random network of ten operations."""
    return lambda seed=0, classes=3, bias=False: _randomise(Small(classes, bias), seed)


@pytest.fixture(scope="session")
def images():
    """(n, seed) -> images that ``small`` takes."""
    return lambda n=4, seed=0: torch.randn(
        n, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="session")
def sources():
    """(networks, example, labels) -> traced and verified sources of tasks a, b, c, ..."""

    def make(networks, example, labels="shared"):
        widths = [network(example[:1]).shape[1] for network in networks]
        tasks = [Task(name, tuple(map(str, range(n)))) for name, n in zip("abcd", widths, strict=False)]
        return make_sources(networks, tasks, example, labels)

    return make


@pytest.fixture(scope="session")
def copies():
    """(network, example, n, seed) -> n copies, all but the first permuted, and the matching that undoes it."""

    def make(network, example, n=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        spec = trace(network, example).spec
        networks, units = [network], {g: [torch.arange(v.size)] for g, v in spec.free.items()}
        units |= {i: [torch.arange(v.size).repeat(v.parts, 1)] for i, v in spec.inner.items()}
        for _ in range(1, n):
            orders = {g: torch.randperm(v.size, generator=generator) for g, v in spec.free.items()}
            for i, v in spec.inner.items():
                rows = [torch.randperm(v.size, generator=generator) for _ in range(v.parts)]
                orders[i] = torch.stack(rows)
                undone = orders[v.outer].argsort() if v.outer in orders else torch.arange(v.parts)
                units[i].append(orders[i][undone].argsort(-1))
            networks.append(copy.deepcopy(network))
            networks[-1].load_state_dict(permute(network.state_dict(), spec, orders))
            for g in spec.free:
                units[g].append(orders[g].argsort())
        stacked = {g: torch.stack(rows) for g, rows in units.items()}
        return networks, Matching(stacked, {g: torch.ones(u.shape).double() for g, u in stacked.items()})

    return make


@pytest.fixture(scope="session")
def splits():
    """(spec, seed) -> a random split of every free group: nothing, everything or any units shared."""

    def make(spec, seed):
        draw = random.Random(seed)
        kept = {g: draw.choice([0, v.size, draw.randint(0, v.size)]) for g, v in spec.free.items()}
        return full_split(spec, {g: draw.sample(range(spec.groups[g].size), k) for g, k in kept.items()})

    return make


@pytest.fixture(scope="session")
def calibrate():
    """(network, images) -> the network with the exact batch-norm statistics of these images."""

    def hook(norm, inputs):
        x = inputs[0].transpose(0, 1).flatten(1)
        norm.running_mean.copy_(x.mean(1))
        norm.running_var.copy_(x.var(1, unbiased=False))

    @torch.no_grad()
    def run(network, x):
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        handles = [norm.register_forward_pre_hook(hook) for norm in norms]
        network(x)
        for handle in handles:
            handle.remove()
        return network

    return run
