"""What refining steps with: every parameter by one optimiser, matrices as torch's Muon does it, however they lie."""

import pytest
import torch

from stages.core.recipe.methods import Refine
from stages.core.units.matching import Matching, full_split
from stages.fit.network import build
from stages.fit.optimizers import ADAM_SHARE, Optimizers, hidden_weights

MUON, ADAMW = (Refine(optimizer=name, learning_rate=0.1, weight_decay=0.05) for name in ("muon", "adamw"))


@pytest.fixture
def network(small, images, sources):
    """Half of the units shared, so that layers have several blocks; random weights and gradients."""
    made = sources([small(seed, 3) for seed in range(2)], images(), "separate")
    spec = made[0].trace.spec
    matching = Matching({name: torch.arange(g.size).repeat(2, 1) for name, g in spec.free.items()}, {})
    split = full_split(spec, {name: range(g.size // 2) for name, g in spec.free.items()})
    found = build(made, matching, split, "separate", {})
    for own in found.parameters():
        own.data.normal_()
    return found


def with_gradients(network):
    generator = torch.Generator().manual_seed(1)
    for own in network.parameters():
        own.grad = torch.randn(own.shape, generator=generator, dtype=own.dtype)
    return network


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_matrices_step_as_torch_has_it_and_the_rest_by_adamw(network, layout):
    network.to(memory_format=layout)
    optimizers, hidden = Optimizers(network, MUON), {id(own) for own in hidden_weights(network)}
    before = [own.detach().clone() for own in network.parameters()]
    with_gradients(network)
    optimizers.step(0.5)
    for own, start in zip(network.parameters(), before, strict=True):
        matrix = id(own) in hidden
        alone = torch.nn.Parameter((start.flatten(1) if matrix else start).clone())
        alone.grad = own.grad.flatten(1) if matrix else own.grad
        decay = 0.05 if own.dim() > 1 else 0.0
        if matrix:
            torch.optim.Muon([alone], lr=0.05, weight_decay=decay, adjust_lr_fn="match_rms_adamw").step()
        else:
            torch.optim.AdamW([alone], lr=0.05 * ADAM_SHARE, weight_decay=decay).step()
        # torch's iteration is in bfloat16, where another order of columns rounds otherwise
        torch.testing.assert_close(own, alone.view_as(own), rtol=0, atol=2e-2 * 0.05 if matrix else 1e-12)
        assert not torch.equal(own, start)


def test_heads_are_no_hidden_weights(network):
    hidden = {id(own) for own in hidden_weights(network)}
    heads = {id(own) for own in network.map_of(network.head).parameters()}
    linear = [network.map_of(node).weights for node in network.trace.graph.nodes if node.linear]
    assert not hidden & heads
    assert hidden == {id(own) for weights in linear for own in weights} - heads
    assert max(len(weights) for weights in linear) > 1


def test_adamw_is_adamw_for_all(network):
    optimizers = Optimizers(with_gradients(network), ADAMW)
    groups = [([own.detach().clone()], own) for own in network.parameters()]
    optimizers.step(1.0)
    for (start,), own in groups:
        alone = torch.nn.Parameter(start)
        alone.grad = own.grad
        torch.optim.AdamW([alone], lr=0.1, weight_decay=0.05 if own.dim() > 1 else 0.0).step()
        torch.testing.assert_close(own.detach(), alone.detach())


def test_gradients_that_are_not_there_change_nothing(network):
    before = [own.detach().clone() for own in network.parameters()]
    optimizers = Optimizers(network, MUON)
    optimizers.zero_grad()
    optimizers.step(1.0)
    assert all(torch.equal(own, start) for own, start in zip(network.parameters(), before, strict=True))
