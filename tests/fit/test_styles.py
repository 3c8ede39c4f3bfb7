"""The hard gates on networks in the styles in which people write theirs."""

import pytest
import torch
from gates import permuted
from styles import STYLES

from stages.allocate.model import cost_model
from stages.api import merge
from stages.core.graph.compare import always_shared
from stages.core.graph.source import Source, Task
from stages.core.graph.trace import lay_out
from stages.core.merged.cost import built_cost, split_cost
from stages.core.merged.file import load_merged
from stages.core.recipe.methods import Fit
from stages.core.sweep.batches import Batch
from stages.core.tracing.known import read_known
from stages.core.tracing.verify import verify
from stages.core.units.matching import full_split, identity_matching
from stages.fit.network import fit_network

AVERAGE = Fit(solver="average")
PROGRESSIVE = Fit(solver="exact", inputs="merged", targets="own", norm="fold")
HELD = (
    "spatial transformer",
    "mixture of experts",
    "largest gates",
    "largest gates, softmaxed",
    "largest gates, masked",
    "largest gates, sparsemax",
    "several hops",
    "one score of each place",
    "points that are turned",
    "bilinear pooling",
    "kernels of a larger map",
    "dynamic convolution",
    "dynamic depthwise convolution",
    "dynamic convolution by a sum",
    "dynamic convolution by einsum",
    "lambda layer",
    "lambda layer, then blocks",
    "fourier of all",
    "spectral convolution",
    "features that are turned",
    "kernels weighed four ways",
    "contextual transformer",
    "criss-cross attention",
    "attention and convolution",
    "neighbours among all images",
    "capsules",
    "latent attention",
    "spans of words",
    "edges of a graph",
    "maps both ways",
    "norms of the input",
    "positions of the input",
)  # outputs in an order of their own, shared at every budget
LOOSE = ("batch statistics",)  # what an image gives depends on the images beside it


def _grouped(network):
    """Whether it has convolutions in groups."""
    return any(getattr(part, "groups", 1) > 1 for part in network.modules())


@pytest.fixture(params=STYLES)
def style(request):
    """(name, seed -> a network, its input)."""
    make, shape = STYLES[request.param]
    generator = torch.Generator().manual_seed(5)
    if len(shape) == 1:
        x = torch.randint(0, 11, (6, *shape), generator=generator)
    else:
        x = torch.randn(6, *shape, generator=generator, dtype=torch.float64)

    def made(seed):
        torch.manual_seed(seed)
        network = make().double().eval()
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if name.endswith("running_var"):
                    tensor.add_(torch.rand_like(tensor))
                elif tensor.is_floating_point():
                    tensor.add_(0.05 * torch.randn_like(tensor))
        return network

    return request.param, made, x


def source(network, x, name):
    reading = read_known(network, x)
    state = reading.state(network)
    shapes = {n: tuple(t.shape) for n, t in state.items()}
    traced = lay_out(reading.graph, shapes, x[:1].shape, reading.place_of)
    return Source(traced, state, Task(name, ("0", "1", "2")))


@pytest.fixture(params=[False, True], ids=["blocks", "dense"])
def dense(request):
    return request.param


def fitted(sources, matching, split, x, fit, labels="shared", dense=False):
    batches, kind = [Batch(x[:3], 0), Batch(x[3:], 1)], torch.float64
    return fit_network(sources, matching, split, batches, fit, labels=labels, dense=dense, precision=kind)[0]


@torch.no_grad()
def test_the_trace_is_verified_and_a_permuted_copy_merges_to_the_network_itself(style, splits, dense):
    name, make, x = style
    network = make(0)
    first = source(network, x, "a")
    verify(network, first.trace, x, state_of=read_known(network, x).state)
    second, matching = permuted(first)
    assert first.trace.spec.free
    for split in (full_split(first.trace.spec), splits(first.trace.spec, 1)):
        found = fitted([first, second], matching, split, x, AVERAGE, dense=dense)
        torch.testing.assert_close(found(x), network(x), rtol=1e-8, atol=1e-8)
        if name not in LOOSE:
            found = fitted([first, second], matching, split, x, PROGRESSIVE, dense=dense)
            assert torch.isfinite(found(x)).all()


@torch.no_grad()
def test_everything_separate_gives_the_sources_side_by_side(style, dense):
    name, make, x = style
    networks = [make(0), make(1)]
    sources = [source(network, x, task) for network, task in zip(networks, "ab", strict=True)]
    spec = sources[0].trace.spec
    split = full_split(spec, dict.fromkeys(spec.free, ()))
    if name in HELD:
        assert always_shared(sources)
        return
    for fit in (AVERAGE, PROGRESSIVE):
        found = fitted(sources, identity_matching(spec, 2), split, x, fit, "separate", dense)
        features, value = found.features(x), found.head.inputs[0]
        dim = found.trace.layouts[value].dim
        for own, positions in zip(sources, found.arrangement(value).positions, strict=True):
            torch.testing.assert_close(
                features.index_select(dim, positions), own.features(x), rtol=1e-8, atol=1e-8
            )
        if fit is AVERAGE:  # the heads, and what follows them, are the sources' own
            for network, task in zip(networks, "ab", strict=True):
                torch.testing.assert_close(found(x, task=task), network(x), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_the_cost_is_what_was_allocated_and_a_file_gives_the_network_back(style, splits, tmp_path, dense):
    _, make, x = style
    sources = [source(make(seed), x, name) for seed, name in enumerate("ab")]
    spec, state = sources[0].trace.spec, sources[0].state
    split = splits(spec, 3)
    found = fitted(sources, identity_matching(spec, 2), split, x, AVERAGE, dense=dense)
    shared = {name: len(s.shared) for name, s in split.items()}
    for kind in ("macs", "parameters"):
        counted = built_cost(found, kind)
        assert counted == split_cost(sources[0].trace, state, "shared", kind, shared, 2, dense)
        model = cost_model(sources[0].trace, state, "shared", kind, 2, dense)
        assert counted == model.cost({name: len(s.separate) for name, s in split.items()})
    found.save(tmp_path / "merged")
    assert torch.equal(load_merged(tmp_path / "merged")(x), found(x))


def test_independent_networks_merge_at_any_budget(style):
    _, make, x = style
    networks, images = {"a": make(0), "b": make(1)}, {"a": [x[:3]], "b": [x[3:]]}
    for by, budget in (("weights", 1.0), ("activations", 1.4), ("activations", 2.0)):
        found = merge(networks, images, budget, {"match": {"by": by}}, progress=False)
        assert found.about["budget"]["reached"] <= budget
        with torch.no_grad():
            assert torch.isfinite(found(x)).all()


@pytest.mark.parametrize("name", [n for n, (make, _) in STYLES.items() if _grouped(make())])
def test_grouped_layers_of_single_precision_are_fitted_with_a_ridge_of_their_own(name):
    make, shape = STYLES[name]
    x = torch.randn(8, *shape)
    merged = merge({n: make().eval() for n in "ab"}, dict.fromkeys("ab", x), 1.3, progress=False)
    assert bool(merged(x).isfinite().all())
