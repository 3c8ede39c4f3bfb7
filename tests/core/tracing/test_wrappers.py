import copy
import logging
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from stages import inspect, merge
from stages.core.graph.nodes import graph_from_json, graph_to_json
from stages.core.graph.source import Task
from stages.core.graph.trace import lay_out
from stages.core.runtime.errors import InputError
from stages.core.tracing.known import read_known
from stages.core.tracing.sources import traced_sources
from stages.core.tracing.trace import trace
from stages.core.tracing.verify import verify


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_a_wrapper_is_read_as_what_it_wraps(small, images, wrap, caplog):
    network = small()
    with caplog.at_level(logging.INFO, "stages.core.tracing.copies"):
        traced = trace(wrap(network), images())
    assert traced == trace(network, images())
    verify(wrap(network), traced, images())
    assert any("read as the module it wraps" in record.message for record in caplog.records)


def test_a_synchronised_batch_norm_is_a_batch_norm(small, images):
    network = small()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    assert trace(synchronised, images()).graph == trace(network, images()).graph


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_a_wrapper_that_does_something_of_its_own_is_refused(small, images, wrap):
    wrapped = wrap(small())
    wrapped.register_forward_hook(lambda module, given, found: found / 2)
    with pytest.raises(InputError, match="a hook on the wrapper; allowed: hooks on the module that it wraps"):
        trace(wrapped, images())


def recording(network):
    kept = network.kept = []
    network.conv1.register_forward_hook(lambda module, given, found: kept.append(found))
    return network


def changing(network):
    network.conv1.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    network.register_forward_hook(lambda module, given, found: found / 2)
    return network


def pruned(network):
    prune.l1_unstructured(network.conv1, "weight", 0.5)
    prune.ln_structured(network.fc, "weight", 0.25, n=2, dim=1)
    return network


def on(name, change):
    def changed(network):
        change(network.get_submodule(name))
        return network

    return changed


ATTACHED = {
    "a hook that records": recording,
    "hooks that change values": changing,
    "masks": pruned,
    "weight norm": on("conv1", parametrizations.weight_norm),
    "weight norm of old": on("conv1", nn.utils.weight_norm),
    "spectral norm": on("conv1", parametrizations.spectral_norm),
    "spectral norm of old": on("conv1", nn.utils.spectral_norm),
    "orthogonal": on("fc", parametrizations.orthogonal),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ATTACHED)
def test_what_is_attached_to_layers_is_read_and_inspected_and_left(small, images, what):
    """Also after a run with gradients, whose results such networks keep among their attributes."""
    network = ATTACHED[what](small()).eval()
    network(images())
    expected = network(images()).detach()
    (source,) = traced_sources([network], [Task("a", ("0", "1", "2"))], images())
    assert torch.allclose(source(images()), expected, atol=1e-10)
    assert inspect(network, images()).groups
    assert torch.equal(network(images()), expected)


def test_what_cannot_be_copied_is_said_in_one_line(small, images):
    network = small()
    network.lock = threading.Lock()
    with pytest.raises(
        InputError, match=r"cannot be copied \(cannot pickle '_thread.lock' object\); allowed"
    ):
        inspect(network, images())


def test_a_scripted_module_is_refused(small, images):
    with pytest.raises(InputError, match="a scripted module; allowed"):
        trace(torch.jit.trace(small(), images()), images())


# -- a graph in a file is data ------------------------------------------------------------------------------------


def altered(traced, change):
    nodes = graph_to_json(traced.graph)
    change(nodes)
    return lay_out(graph_from_json(nodes), traced.parameters, (1, 2, 8, 8))


BROKEN = {
    "operation": (lambda nodes: nodes[1].update(operation="eval"), "no rule for eval"),
    "input": (lambda nodes: nodes[2].update(inputs=["later"]), "reads 'later', which is not there"),
    "tensor": (lambda nodes: nodes[1]["parameters"].update(weight="absent"), "reads 'absent'"),
    "twice": (lambda nodes: nodes[2].update(name=nodes[1]["name"]), "is there twice"),
    "pads": (
        lambda nodes: nodes[2].update(operation="pad", parameters={}, attributes={"pad": [0, 2**40]}),
        "found shape"),
    "setting": (lambda nodes: nodes[1]["attributes"].update(stride="far"), "conv2d cannot run"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_graph_from_a_file_is_checked_before_anything_is_allocated(small, images, what):
    change, message = BROKEN[what]
    with pytest.raises(InputError, match=message) as error:
        altered(trace(small(), images()), change)
    assert "\n" not in str(error.value)


def test_a_tensor_out_of_proportion_is_refused(small, images):
    traced = trace(small(), images())
    with pytest.raises(InputError, match=r"conv1\.weight: found shape"):
        lay_out(traced.graph, {**traced.parameters, "conv1.weight": (2**20, 2**20)}, (1, 2, 8, 8))


def test_a_graph_survives_its_file(small, images):
    traced = trace(small(), images())
    assert altered(traced, lambda nodes: None) == traced


class Seen(nn.Module):
    """Reads what a hook has kept in a dict of the network, which the hook closes over."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(11, 3)
        self.seen = {}
        plain = self.second.forward
        self.second.forward = lambda x: plain(x).tanh()

        def kept(name):
            def hook(module, given, found):
                self.seen[name] = found
                return self.second.weight.sum() * 0 + found

            return hook

        self.first.register_forward_hook(kept("first"))

    def forward(self, x):
        found = self.second(self.first(x).relu())
        return {"logits": self.head(torch.cat([found, self.seen.pop("first")], 1))}


@torch.no_grad()
def test_a_hook_that_closes_over_the_network_closes_over_its_copy():
    networks, images = [Seen(), Seen()], torch.randn(8, 4)
    both, given = dict(zip("ab", networks, strict=True)), {"a": images, "b": images}
    merged = merge(both, given, 2.0, "average", progress=False)
    mean = sum(network(images)["logits"] for network in networks) / 2
    torch.testing.assert_close(merged(images), mean, rtol=1e-4, atol=1e-5)
    assert not networks[0].seen


class Chosen(nn.Module):
    """Whose activation is a plain attribute."""

    def __init__(self, act, slope=0.1):
        super().__init__()
        self.act, self.slope = act, slope
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.act(self.first(x)) * self.slope)


def test_a_network_that_differs_in_what_images_seldom_show_is_read_anew():
    graphs = [
        read_known(Chosen(*settings), torch.zeros(2, 3)).graph
        for settings in ((F.relu,), (F.relu6,), (F.relu, 0.1 + 1e-12), (F.relu,))
    ]
    assert len({str(graph) for graph in graphs}) == 3
    assert graphs[0] == graphs[3]
    assert "relu6" in [node.operation for node in graphs[1].nodes]


class Remembers(nn.Module):
    """Keeps what it makes of a weight until it is trained again, as LeViT and TinyViT keep their attention biases."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.table, self.kept = (
            nn.Conv2d(3, 4, 1),
            nn.Linear(4, 3),
            nn.Parameter(torch.rand(4)),
            {},
        )

    def train(self, mode=True):
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def forward(self, x):
        if "table" not in self.kept:
            self.kept["table"] = self.table[torch.tensor([3, 1, 2, 0])]
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)) * self.kept["table"])


@pytest.mark.parametrize("gradient", [False, True])
def test_a_network_that_ran_before_is_read_as_one_that_did_not(gradient):
    module, x = Remembers().eval(), torch.randn(2, 3, 4, 4)
    with torch.set_grad_enabled(gradient):
        module(x)
    traced = trace(module, x)
    verify(module, traced, x)
    kept = module.kept["table"]
    assert traced.graph == trace(Remembers().eval(), x).graph
    assert module.kept["table"] is kept
