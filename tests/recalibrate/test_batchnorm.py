"""Batch-norm recomputation: exact statistics of the network's own values, copies left alone."""

import torch
from torch import nn

from stages.core.recipe.methods import Fit
from stages.core.sweep.batches import images_to_batches
from stages.core.units.matching import full_split, identity_matching
from stages.fit.network import fit_network
from stages.recalibrate.batchnorm import recompute_statistics


def merged(sources, batches, kept=None):
    spec = sources[0].trace.spec
    average = Fit(solver="average")
    return fit_network(
        sources, identity_matching(spec, 2), full_split(spec, kept), batches, average, labels="shared"
    )[0]


@torch.no_grad()
def test_every_norm_gets_the_statistics_of_its_own_input(small, images, sources):
    made = sources([small(0), small(1)], images())
    tasks = [images(12, 0), images(12, 1)]
    network = merged(made, images_to_batches(tasks, 5))
    recompute_statistics(network, images_to_batches(tasks, 5))
    seen = {}
    for name, module in network.maps.items():
        if isinstance(module, nn.BatchNorm2d):
            node = next(n for n in network.trace.graph.nodes if f"{n.name}_" == name)
            seen[name] = node.inputs[0]
    values = {network.trace.graph.nodes[0].name: torch.cat(tasks)}
    for node in network.trace.graph.nodes[1:]:
        values[node.name] = network.run_node(node, [values[i] for i in node.inputs])
    for name, value in seen.items():
        x = values[value].transpose(0, 1).flatten(1)
        torch.testing.assert_close(network.maps[name].running_mean, x.mean(1))
        torch.testing.assert_close(network.maps[name].running_var, x.var(1, unbiased=False))


def test_a_second_time_changes_nothing(small, images, sources):
    made = sources([small(0), small(1)], images())
    batches = images_to_batches([images(8, 0), images(6, 1)], 4)
    network = merged(made, batches)
    recompute_statistics(network, batches)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    recompute_statistics(network, batches)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-10, atol=1e-12)


def test_everything_separate_keeps_the_sources_statistics(small, images, sources):
    made = sources([small(0), small(1)], images())
    batches = images_to_batches([images(8, 0), images(6, 1)], 4)
    network = merged(made, batches, dict.fromkeys(made[0].trace.spec.free, ()))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    recompute_statistics(network, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_tasks_weigh_alike_whatever_their_number_of_images(small, images, sources):
    made = sources([small(0), small(1)], images())
    few, many = images(4, 0), images(4, 1)
    found = []
    for tasks in ([few, many], [few, torch.cat([many] * 3)]):
        batches = images_to_batches(tasks, 4)
        network = merged(made, batches)
        recompute_statistics(network, batches)
        found.append(network.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name])
