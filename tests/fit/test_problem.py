"""What a layer's fit is given."""

import pytest
import torch
from live import Live

from stages.core.merged.network import MergedNetwork
from stages.core.recipe.methods import Fit
from stages.core.recipe.sections import RIDGE
from stages.core.sweep.batches import NO_TASK, Batch, images_to_batches
from stages.core.sweep.sweep import Sweep
from stages.fit.average import fill_average
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem
from stages.fit.setup import Setup
from stages.fit.solvers.exact import Dense
from stages.fit.visitor import FitVisitor


class Each:
    """Calls ``see`` with every linear node's problem."""

    def __init__(self, setup, see):
        self.setup, self.see = setup, see

    def wants(self, node):
        return node.linear

    def visit(self, node, sweep):
        self.see(LayerProblem(Layer(self.setup, node), sweep))


def merged(made, labels="shared", shared=None):
    shared = shared or {name: group.size // 2 for name, group in made[0].trace.spec.free.items()}
    network = MergedNetwork(made[0].trace, [source.task for source in made], labels, shared)
    network.to(next(iter(made[0].state.values())).dtype)
    fill_average(network, made)
    return network


def each_problem(setup, batches, see):
    running = setup.network if setup.fit.inputs == "merged" else None
    Sweep(setup.sources, batches, running).run(Each(setup, see))


def test_a_ridge_of_the_method_comes_first_and_regmean_is_what_it_is(small, images, sources):
    made = sources([small(0), small(1)], images())
    network = merged(made)
    assert Setup(network, made, Fit()).ridge == "auto"
    assert Setup(network, made, Fit(), 0.2).ridge == 0.2
    assert Setup(network, made, Fit(ridge=0.0), 0.2).ridge == 0.0
    visitor = FitVisitor(Setup(network, made, Fit(solver="regmean")))
    assert (visitor.setup.fit.inputs, visitor.setup.fit.targets) == ("source", "own")
    assert visitor.setup.ridge == RIDGE


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["source", "merged"])
@pytest.mark.parametrize("positions", [1.0, 0.3])
def test_rows_of_the_inputs_alone_are_those_beside_the_targets(small, images, sources, inputs, positions):
    made, seen = sources([small(0), small(1)], images()), []
    setup = Setup(merged(made), made, Fit(inputs=inputs, targets="own"), positions=positions)

    def see(problem):
        for index, _, _ in problem.batches():
            both, alone = [], []
            state = setup.generator.get_state()
            problem.by_rows(
                problem.inputs(index), problem.targets(index), lambda z, y, both=both: both.append((z, y))
            )
            setup.generator.set_state(state)
            problem.each_input_rows(index, alone.append)
            assert len(both) == len(alone) > 0
            for (z, y), z_alone in zip(both, alone, strict=True):
                assert torch.equal(z, z_alone)
                assert z.shape == (len(y), problem.layer.d_in)
                assert y.shape[1] == problem.layer.d_out
                seen.append(len(y))

    each_problem(setup, images_to_batches([images(5, 0), images(3, 1)], 4), see)
    convolutions = {1.0: 2 * (64 + 64 + 16 + 16), 0.3: 2 * (19.2 + 19.2 + 4.8 + 4.8)}[positions]
    assert sum(seen) == pytest.approx(4 * convolutions + 2 * 8, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("owned", [True, False])
def test_an_image_counts_for_its_own_head_where_it_has_a_task(small, images, sources, owned):
    made, found = sources([small(0, 2), small(1, 3)], images(), "separate"), {}
    network = merged(made, "separate")
    batches = [Batch(images(4, task), task if owned else NO_TASK) for task in (0, 1)]

    def see(problem):
        found[problem.layer.name] = [problem.counted(task)[0].tolist() for _, task, _ in problem.batches()]

    each_problem(Setup(network, made, Fit(), owned=owned), batches, see)
    every = [[True] * 5] * 2
    assert found.pop("fc") == ([[True] * 2 + [False] * 3, [False] * 2 + [True] * 3] if owned else every)
    assert all(all(map(all, own)) for own in found.values())


def held_and_promised(made, x, *ridge, rows=None):
    """Bytes of the only layer's fit to a batch of each task, and what was predicted. rows: as it is solved on them."""
    found, batch = [], len(x[0])

    def see(problem):
        assert rows is None or problem.layer.few_rows(problem.images()) == rows
        with Live() as live:
            Dense().fit(problem)
        found.append((live.peak, Dense().bytes(problem.layer, len(x) * batch, batch)))

    each_problem(Setup(merged(made), made, Fit(targets="own"), *ridge), images_to_batches(x, batch), see)
    [pair] = found
    return pair


@torch.no_grad()
def test_a_layer_that_is_solved_on_its_rows_holds_what_was_predicted(randomise, sources):
    x = [torch.randn(40, 300, dtype=torch.float64) for _ in range(2)]
    networks = [randomise(torch.nn.Sequential(torch.nn.Linear(300, 250)), seed) for seed in (0, 1)]
    held, promised = held_and_promised(sources(networks, x[0][:2]), x, rows=80)
    assert 0.8 * promised <= held <= 1.02 * promised


@torch.no_grad()
@pytest.mark.parametrize("ridge", [0.1, "auto"])
def test_a_transposed_convolution_holds_what_was_predicted(randomise, sources, ridge):
    x = [torch.randn(24, 12, 10, 10, dtype=torch.float64) for _ in range(2)]
    networks = [randomise(torch.nn.ConvTranspose2d(12, 9, 4, 2, 1), seed) for seed in (0, 1)]
    held, promised = held_and_promised(sources(networks, x[0][:2]), x, ridge)
    assert 0.5 * promised <= held <= 1.02 * promised
