import copy

import gates
import pytest
import torch
from library_styles import LIBRARY
from torch import nn

from stages.api import merge
from stages.core.align.order import align, merged_units
from stages.core.graph.source import Task
from stages.core.networks.architectures import build
from stages.core.runtime.errors import InputError
from stages.core.tracing.sources import make_sources
from stages.core.units.matching import Matching, full_split, identity_matching


def tasks(*classes):
    return [Task(name, tuple(map(str, range(n)))) for name, n in zip("abc", classes, strict=False)]


@torch.no_grad()
def test_a_source_computes_what_its_network_does(small, images, sources):
    networks = [small(0), small(1), small(2)]
    for source, network in zip(sources(networks, images()), networks, strict=True):
        torch.testing.assert_close(source(images()), network(images()), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_making_sources_leaves_the_networks_as_they_were(small, images, sources):
    networks = [small(0).train(), small(1)]
    states = [copy.deepcopy(network.state_dict()) for network in networks]
    make_sources(networks, tasks(3, 3), images(), "shared")
    assert [network.training for network in networks] == [True, False]
    for network, state in zip(networks, states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


@torch.no_grad()
def test_aligning_leaves_every_function_alone(small, images, sources, splits):
    made = sources([small(0), small(1), small(2)], images())
    spec = made[0].trace.spec
    generator = torch.Generator().manual_seed(0)
    units = {
        name: torch.stack(
            [torch.arange(g.size), *(torch.randperm(g.size, generator=generator) for _ in "12")]
        )
        for name, g in spec.free.items()
    }
    for seed in range(5):
        for source, aligned in zip(made, align(made, Matching(units, {}), splits(spec, seed)), strict=True):
            torch.testing.assert_close(aligned(images()), source(images()), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_aligned_features_lie_in_the_recorded_order(small, images, sources, splits, copies):
    networks, matching = copies(small(0), images(), 3)
    made = sources(networks, images())
    chosen = splits(made[0].trace.spec, 3)
    units = merged_units(matching, chosen)
    node = next(node for node in made[0].graph.nodes if node.name == "conv1")
    for m, aligned in enumerate(align(made, matching, chosen)):
        own = made[m].run_node(node, [images()])
        torch.testing.assert_close(aligned.run_node(node, [images()]), own[:, units["conv1"][m]])


def test_aligning_copies_makes_them_equal(small, images, sources, copies):
    networks, matching = copies(small(0), images(), 3)
    made = sources(networks, images())
    first, *others = align(made, matching, full_split(made[0].trace.spec))
    for other in others:
        assert all(torch.equal(other.state[name], tensor) for name, tensor in first.state.items())


def refused(networks, task_list, example, labels, message):
    with pytest.raises(InputError, match=message) as error:
        make_sources(networks, task_list, example, labels)
    assert "\n" not in str(error.value)


def test_one_network_is_refused(small, images):
    refused([small()], tasks(3), images(), "shared", "found 1 network; allowed: two or more")


def test_networks_of_different_depth_or_settings_are_refused():
    x = torch.zeros(1, 3, 8, 8)
    shallow, deep = (build("resnet", {"depth": depth, "width": 2, "classes": 3}) for depth in (8, 14))
    refused([shallow, deep], tasks(3, 3), x, "shared", "task b: .* operations, the first network has")
    strided = copy.deepcopy(shallow)
    strided.conv1.stride = (2, 2)
    refused([shallow, strided], tasks(3, 3), x, "shared", "task b: conv1 is conv2d .*stride")


def test_networks_of_different_width_are_refused():
    x = torch.zeros(1, 3, 8, 8)
    networks = [build("resnet", {"depth": 8, "width": width, "classes": 3}) for width in (2, 3)]
    refused(
        networks,
        tasks(3, 3),
        x,
        "shared",
        r"task b: conv1.weight is \(3, 3, 3, 3\), in the first network \(2,",
    )


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(small, images, which, value):
    networks = [small(0), small(1)]
    networks[which].bn2.running_mean[1] = value
    refused(
        networks, tasks(3, 3), images(), "shared", f"task {'ab'[which]}: bn2.running_mean holds NaN or inf"
    )


def test_a_number_of_logits_that_is_not_that_of_the_classes_is_refused(small, images):
    refused([small(0), small(1)], tasks(3, 4), images(), "shared", "task b: 3 logits for 4 classes")


def test_heads_of_different_size_need_separate_label_spaces(small, images, sources):
    networks = [small(0, 3), small(1, 5)]
    refused(networks, tasks(3, 5), images(), "shared", "task b: fc.weight")
    assert [len(s.task.classes) for s in sources(networks, images(), "separate")] == [3, 5]


def test_shared_labels_need_the_same_classes(small, images):
    other = [Task("a", ("x", "y", "z")), Task("b", ("x", "y", "w"))]
    refused(
        [small(0), small(1)], other, images(), "shared", "labels: shared, but .* allowed: labels: separate"
    )


def test_a_network_with_other_tensors_is_refused(small, images):
    more = small(0)
    more.auxiliary = nn.Linear(2, 2).double()  # never run
    message = "task b: auxiliary.bias is missing in "
    refused([more, small(1)], tasks(3, 3), images(), "shared", message + "this network")
    refused([small(1), more], tasks(3, 3), images(), "shared", message + "the first network")


def test_an_operation_without_a_rule_stops_with_its_name(images):
    class Sums(nn.Module):
        def forward(self, x):
            return torch.special.erfcx(x)

    networks = [nn.Sequential(nn.Conv2d(2, 3, 1), Sums()).double() for _ in range(2)]
    refused(networks, tasks(3, 3), images(), "shared", "1: no rule for special_erfcx")


def test_the_identity_matching_pairs_equal_indices(small, images, sources):
    made = sources([small(0), small(1)], images())
    spec = made[0].trace.spec
    for source, same in zip(made, align(made, identity_matching(spec, 2), full_split(spec)), strict=True):
        assert all(torch.equal(source.state[name], tensor) for name, tensor in same.state.items())


@torch.no_grad()
def test_what_differs_and_acts_on_the_input_is_said_and_merged_at_every_budget(caplog):
    networks = [gates.trained(LIBRARY["norms of the input"][0], seed) for seed in (0, 1)]
    images = torch.randn(6, 3, 8, 8)
    merged = merge(dict(zip("ab", networks, strict=True)), {"a": images, "b": images}, 2.0, progress=False)
    assert torch.isfinite(merged(images)).all()
    said = "norm.running_mean, ... (5): differ between the networks, but act on units that keep their order"
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert said in told[0]
    caplog.clear()
    make_sources([networks[0], copy.deepcopy(networks[0])], tasks(3, 3), images, "shared")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
