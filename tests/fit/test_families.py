"""The hard gates, family by family, on narrow networks of the classes that people use."""

import pytest
import torch
from families import FAMILIES, spread
from live import Live
from torch.utils.flop_counter import FlopCounterMode

from stages.allocate.model import cost_model
from stages.api import merge
from stages.core.merged.cost import built_cost, source_cost, split_cost
from stages.core.merged.file import load_merged
from stages.core.merged.network import MergedNetwork
from stages.core.recipe.methods import Fit
from stages.core.sweep.batches import Batch, images_to_batches
from stages.core.sweep.memory import peak_bytes
from stages.core.sweep.sweep import Sweep
from stages.core.tracing.trace import trace
from stages.core.tracing.verify import verify
from stages.core.units.matching import full_split, identity_matching
from stages.fit.average import fill_average
from stages.fit.network import fit_network
from stages.fit.setup import Setup
from stages.fit.visitor import FitVisitor
from stages.recalibrate.batchnorm import recompute_statistics

AVERAGE = Fit(solver="average")
PROGRESSIVE = Fit(solver="exact", inputs="merged", targets="own", norm="fold")
PUBLISHED = Fit(solver="exact", inputs="source", targets="ensemble")


@pytest.fixture(params=FAMILIES)
def family(request, randomise):
    """(seed -> a random network, images)."""
    make, side = FAMILIES[request.param]
    x = torch.randn(6, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return lambda seed: spread(randomise(make(), seed), seed), x


@pytest.fixture(params=[False, True], ids=["blocks", "dense"])
def dense(request):
    return request.param


def alone(source, x):
    """Every value of one source."""
    values = {source.graph.nodes[0].name: x}
    for node in source.graph.nodes[1:]:
        values[node.name] = source.run_node(node, [values[name] for name in node.inputs])
    return values


def batches(x):
    return [Batch(x[:3], 0), Batch(x[3:], 1)]


def merged(made, matching, split, x, fit, labels="shared", **settings):
    return fit_network(
        made, matching, split, batches(x), fit, labels=labels, **{"precision": x.dtype, **settings}
    )[0]


@torch.no_grad()
def test_the_trace_is_verified_and_a_permuted_copy_is_the_same_function(family, copies):
    make, x = family
    network = make(0)
    traced = trace(network, x)
    verify(network, traced, x)
    pair, _ = copies(network, x)
    torch.testing.assert_close(pair[1](x), pair[0](x), rtol=1e-9, atol=1e-9)
    moved = [
        name
        for name in traced.parameters
        if not torch.equal(pair[0].state_dict()[name], pair[1].state_dict()[name])
    ]
    bare = {name for name in traced.parameters if "num_batches" in name}
    fixed = {name for name in traced.graph.output.parameters.values() if name.endswith("bias")}
    assert set(traced.parameters) - set(moved) <= bare | fixed


@torch.no_grad()
@pytest.mark.parametrize(
    "fit", [AVERAGE, PROGRESSIVE, PUBLISHED], ids=["average", "progressive", "published"]
)
def test_a_permuted_copy_merges_to_the_network_itself_at_any_size(
    family, copies, sources, splits, calibrate, fit, dense
):
    make, x = family
    pair, matching = copies(calibrate(make(0), x), x)
    made = sources(pair, x)
    for split in (full_split(made[0].trace.spec), splits(made[0].trace.spec, 1)):
        found = merged(made, matching, split, x, fit, dense=dense)
        torch.testing.assert_close(found(x), pair[0](x), rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_everything_separate_gives_the_sources_side_by_side(family, sources, dense):
    make, x = family
    networks = [make(0), make(1)]
    made = sources(networks, x, "separate")
    spec = made[0].trace.spec
    split = full_split(spec, dict.fromkeys(spec.free, ()))
    matching = identity_matching(spec, 2)
    for fit in (AVERAGE, PROGRESSIVE):
        found = merged(made, matching, split, x, fit, "separate", dense=dense)
        recompute_statistics(found, batches(x))  # leaves copies alone
        name = found.head.inputs[0]
        features = found.features(x)
        for source, positions in zip(made, found.arrangement(name).positions, strict=True):
            torch.testing.assert_close(features[:, positions], alone(source, x)[name], rtol=1e-8, atol=1e-8)
        for source, task in zip(networks, "ab", strict=True):
            if fit is AVERAGE:  # the heads are the sources' own
                torch.testing.assert_close(found(x, task=task), source(x), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_the_cost_is_counted_alike_by_formula_model_and_blocks_and_a_file_gives_it_back(
    family, sources, splits, tmp_path, dense
):
    make, x = family
    made = sources([make(0), make(1)], x)
    spec, state = made[0].trace.spec, made[0].state
    for seed in range(4):
        split = splits(spec, seed)
        found = merged(made, identity_matching(spec, 2), split, x, AVERAGE, dense=dense)
        shared = {name: len(s.shared) for name, s in split.items()}
        for kind in ("macs", "parameters"):
            counted = built_cost(found, kind)
            assert counted == split_cost(made[0].trace, state, "shared", kind, shared, 2, dense)
            model = cost_model(made[0].trace, state, "shared", kind, 2, dense)
            assert counted == model.cost({name: len(s.separate) for name, s in split.items()})
        with FlopCounterMode(display=False) as counter:
            found(x[:1])
        attention = sum(
            found.trace.hidden_macs(n) * found.arrangement(n.name).width for n in found.trace.graph.nodes
        )
        assert counter.get_total_flops() == 2 * (
            built_cost(found, "macs") - attention
        )  # torch counts it on a GPU
        found.save(tmp_path / "merged")
        loaded = load_merged(tmp_path / "merged")
        assert torch.equal(loaded(x), found(x))
        assert loaded.trace.layouts == found.trace.layouts
    assert source_cost(made[0].trace, state, "shared", "parameters") == sum(
        state[name].numel() for name, _ in make(0).named_parameters()
    )


@pytest.mark.parametrize("fit", [PROGRESSIVE, PUBLISHED], ids=["progressive", "published"])
def test_a_fit_holds_what_was_predicted(family, sources, splits, fit, dense, monkeypatch):
    monkeypatch.setattr("stages.fit.layer.ROW_ENTRIES", 2**15)
    make, x = family
    made = sources([make(0), make(1)], x)
    shared = {name: len(split.shared) for name, split in splits(made[0].trace.spec, 1).items()}
    tasks = [source.task for source in made]
    network = MergedNetwork(made[0].trace, tasks, "shared", shared, dense=dense).double()
    fill_average(network, made)
    own = torch.randn(60, *x.shape[1:], dtype=x.dtype)
    data = images_to_batches([own, own.clone()], 5)
    visitor = FitVisitor(Setup(network, made, fit))
    sweep = Sweep(made, data, network if fit.inputs == "merged" else None, x.dtype)
    promised = peak_bytes(sweep, visitor)
    with Live() as live:
        sweep.run(visitor)
    found = live.peak + sum(batch.images.nbytes for batch in data)
    assert found <= 1.05 * promised


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_independent_networks_merge_at_any_budget(family, by):
    make, x = family
    networks, images = {"a": make(0), "b": make(1)}, {"a": [x[:3]], "b": [x[3:]]}
    for budget in (1.0, 1.4, 2.0):
        found = merge(networks, images, budget, {"match": {"by": by}}, progress=False)
        reached = built_cost(found, "macs") / source_cost(
            found.trace, networks["a"].state_dict(), "shared", "macs"
        )
        assert found.about["budget"]["reached"] == pytest.approx(reached)
        assert reached <= budget
        if budget != 1.4:
            assert reached == budget
        with torch.no_grad():
            assert torch.isfinite(found(x)).all()


UNITS = {  # what may be separate: {group: units}, orders inside units
    "vit": (
        {"conv_proj": 8, "encoder.layers.encoder_layer_0.self_attention.heads": 2,
         "encoder.layers.encoder_layer_0.mlp.0": 12, "encoder.layers.encoder_layer_1.self_attention.heads": 2,
         "encoder.layers.encoder_layer_1.mlp.0": 12},
        {f"encoder.layers.encoder_layer_{i}.self_attention.{what}" for i in (0, 1) for what in ("query", "value")},
    ),
    "grouped": ({"grouped.groups": 3, "between": 4}, {"stem", "grouped", "twice"}),
    "group norm": ({"first.groups": 2, "second.groups": 2}, {"stem", "branch"}),
    "one group": ({"stem": 8, "branch": 4}, set()),
    "instance norm": ({"stem": 8, "branch": 4}, set()),
    "convnext": ({"features.0.0": 4, "features.1.0.block.3": 16, "features.2.1": 6, "features.3.0.block.3": 24}, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", UNITS)
def test_the_units_that_may_be_separate(name):
    make, side = FAMILIES[name]
    spec = trace(make(), torch.zeros(1, 3, side, side)).spec
    assert ({name: g.size for name, g in spec.free.items()}, set(spec.inner)) == UNITS[name]
