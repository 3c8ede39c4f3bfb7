"""A merged network takes the inputs that its sources take, and no others."""

import pytest
import torch
from torch import nn

from stages.api import load_merged, merge
from stages.core.graph.source import Task
from stages.core.merged.network import MergedNetwork
from stages.core.runtime.errors import InputError
from stages.core.tracing.trace import trace


class Pooled(nn.Module):
    """Takes images of any size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.more = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.more(torch.relu(self.conv(x)))).mean((2, 3)))


class Flattened(Pooled):
    """A pooling leaves the last row of 9 x 9 away."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6 * 16, 3)

    def forward(self, x):
        return self.fc(nn.functional.max_pool2d(torch.relu(self.more(self.conv(x))), 2).flatten(1))


class Placed(Pooled):
    """An embedding of positions."""

    def __init__(self):
        super().__init__()
        self.where = nn.Parameter(torch.randn(1, 6, 8, 8))

    def forward(self, x):
        return self.fc(torch.relu(self.more(torch.relu(self.conv(x) + self.where))).mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.table(x)).mean(1))


def merged(network, example, share):
    traced = trace(network, example)
    shared = {name: group.size * share // 2 for name, group in traced.spec.free.items()}
    net = MergedNetwork(traced, [Task(n, ("0", "1", "2")) for n in "ab"], "shared", shared)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net


SHAPES = [
    (2, 1, 8, 8), (1, 1, 8, 8), (2, 3, 8, 8), (2, 2, 8, 8), (2, 1, 9, 9), (2, 1, 16, 16), (2, 1, 4, 4), (2, 1, 1, 1),
    (2, 1, 8, 16), (2, 1, 16, 8), (1, 8, 8), (8, 8), (2, 1, 8, 8, 8), (2, 1, 8, 1), (0, 1, 8, 8), (2, 64),
]  # fmt: skip


@pytest.mark.parametrize("share", [0, 1, 2])
@pytest.mark.parametrize("make", [Pooled, Flattened, Placed])
@torch.no_grad()
def test_it_takes_what_the_source_takes(make, share):
    network = make().eval()
    net = merged(network, torch.zeros(1, 1, 8, 8), share)
    for shape in SHAPES:
        x = torch.randn(shape)
        try:
            wanted = network(x).shape if len(shape) == 4 else None  # torch takes an image without its batch
        except RuntimeError:
            wanted = None
        if make is Placed and shape[2:] != (8, 8):
            wanted = None  # broadcast to the positions: meant by nobody
        if wanted is not None and 0 not in shape:
            assert net(x).shape == wanted, shape
        elif wanted is None:
            with pytest.raises(
                (InputError, RuntimeError), match=r"(found|gives) .*allowed: |size is too small"
            ):
                net(x)


def test_numbers_of_another_kind_are_refused():
    images = merged(Pooled(), torch.zeros(1, 1, 8, 8), 1)
    for dtype in (torch.uint8, torch.bool, torch.complex64, torch.int64):
        with pytest.raises(InputError, match=f"input: found {dtype}; allowed: floats"):
            images(torch.zeros(2, 1, 8, 8, dtype=dtype))
    tokens = merged(Tokens(), torch.zeros(1, 5, dtype=torch.int64), 1)
    assert tokens(torch.zeros(2, 9, dtype=torch.int32)).shape == (2, 3)  # more tokens than were traced
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(InputError, match=f"input: found {dtype}; allowed: whole"):
            tokens(torch.zeros(2, 5, dtype=dtype))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_merged_network_has_the_type_of_its_sources_and_says_so(dtype, tmp_path):
    networks, x = {name: Flattened().to(dtype) for name in "ab"}, torch.randn(4, 1, 8, 8)
    net = merge(networks, {name: [x] for name in "ab"}, 1.3, progress=False)
    net.save(tmp_path / "merged")
    for own in (net, load_merged(tmp_path / "merged")):
        assert own(x.to(dtype)).dtype == dtype
        assert {p.dtype for p in own.parameters()} == {dtype}
        with pytest.raises(InputError, match=f"input: found torch.float32; allowed: {dtype}, as the network"):
            own(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert merged(Flattened(), torch.zeros(1, 1, 8, 8), 1)(x).dtype == torch.bfloat16


@torch.no_grad()
def test_the_checks_are_no_branches_of_an_exported_program():
    net = merged(Flattened(), torch.zeros(1, 1, 8, 8), 1)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.randn(3, 1, 8, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(program.module()(x), net(x))
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))
