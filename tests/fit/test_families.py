"""The hard gates, family by family, on narrow networks of the classes that people use."""

import pytest
import torch
import torch.nn.functional as F
from live import Live
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import mobilenetv2, resnet, vgg, vision_transformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from stages.allocate.model import cost_model
from stages.api import merge
from stages.core.cost import built_cost, source_cost, split_cost
from stages.core.methods import Fit
from stages.core.network import MergedNetwork, load_merged
from stages.core.spec import full_split, identity_matching
from stages.core.sweep import Batch, Sweep, images_to_batches, peak_bytes
from stages.core.trace import trace, verify
from stages.fit.average import fill_average
from stages.fit.layerwise import Fitter
from stages.fit.merge import fit_network
from stages.recalibrate.batchnorm import recompute_statistics

AVERAGE = Fit(solver="average")
PROGRESSIVE = Fit(solver="exact", inputs="merged", targets="own", norm="fold")
PUBLISHED = Fit(solver="exact", inputs="source", targets="ensemble")


def narrow_vgg(batch_norm):
    layers = vgg.make_layers([4, "M", 6, "M", 5, 5, "M"], batch_norm=batch_norm)
    network = vgg.VGG(layers, num_classes=3)
    network.classifier = nn.Sequential(
        nn.Linear(5 * 49, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 4), nn.ReLU(True), nn.Linear(4, 3)
    )
    return network


class Normed(nn.Module):
    """A residual stream and a branch under group norm; ``groups`` 1 is a layer norm over channels and places."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), norm(8)
        self.branch, self.second = nn.Conv2d(8, 4, 3, padding=1), norm(4)
        self.back, self.third = nn.Conv2d(4, 8, 1), norm(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.first(self.stem(x)))
        x = x + self.third(self.back(F.relu(self.second(self.branch(x)))))
        return self.fc(F.relu(x).mean((2, 3)))


class Written(nn.Module):
    """Attention written out, as many models have it, with a scale of the branch and a mean over tokens."""

    def __init__(self, heads=2, width=8):
        super().__init__()
        self.heads, self.stem, self.norm = heads, nn.Conv2d(3, width, 4, stride=4), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        n, tokens, width = x.shape
        y = self.qkv(self.norm(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        return self.fc((x + self.out(y) * self.scale).mean(1))


class Grouped(nn.Module):
    """Grouped convolutions that change the width, with a bias, and a depthwise one with two outputs a channel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 9, 3, padding=1, groups=3)
        self.between = nn.Conv2d(9, 4, 1)
        self.twice = nn.Conv2d(4, 8, 3, groups=4)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        return self.fc(F.relu(self.twice(self.between(x))).mean((2, 3)))


def mlp_with_layer_norm():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.LayerNorm(7), nn.GELU(), nn.Dropout(), nn.Linear(7, 5),
        nn.LayerNorm(5, bias=False), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip


FAMILIES = {  # name: (constructor, image size)
    "mlp": (lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), 2),
    "mlp with layer norm": (mlp_with_layer_norm, 2),
    "vgg": (lambda: narrow_vgg(False), 32),
    "vgg_bn": (lambda: narrow_vgg(True), 32),
    "resnet": (lambda: narrowed(resnet.BasicBlock), 32),
    "wide_resnet": (lambda: narrowed(resnet.Bottleneck, width_per_group=8), 32),
    "resnext": (lambda: narrowed(resnet.Bottleneck, groups=4, width_per_group=4), 32),
    "mobilenet_v2": (lambda: mobilenetv2.MobileNetV2(
        num_classes=3, width_mult=0.1, inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 2, 2], [2, 16, 1, 2]]), 32),
    "grouped": (Grouped, 8),
    "group norm": (lambda: Normed(lambda c: nn.GroupNorm(2, c)), 8),
    "one group": (lambda: Normed(lambda c: nn.GroupNorm(1, c)), 8),
    "instance norm": (lambda: Normed(lambda c: nn.InstanceNorm2d(c, affine=True)), 8),
    "convnext": (lambda: ConvNeXt([CNBlockConfig(4, 6, 1), CNBlockConfig(6, None, 1)], num_classes=3), 32),
    "written attention": (Written, 8),
    "vit": (lambda: vision_transformer.VisionTransformer(16, 8, 2, 2, 8, 12, num_classes=3), 16),
}  # fmt: skip


def narrowed(block, **arguments):
    network = resnet.ResNet(block, [1, 1, 1, 1], num_classes=3, **arguments)
    network.layer3 = network.layer4 = nn.Identity()
    network.fc = nn.Linear(128 * block.expansion, 3)
    return network


@pytest.fixture(params=FAMILIES)
def family(request, randomise):
    """(seed -> a random network, images)."""
    make, side = FAMILIES[request.param]
    x = torch.randn(6, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return lambda seed: spread(randomise(make(), seed), seed), x


def spread(network, seed):
    """Tokens, embeddings and layer scales of one image (1, ...) are random too."""
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return network


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
        made, matching, split, batches(x), fit, labels=labels, **{"storage": x.dtype, **settings}
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
    family, copies, sources, splits, calibrate, fit
):
    make, x = family
    pair, matching = copies(calibrate(make(0), x), x)
    made = sources(pair, x)
    for split in (full_split(made[0].trace.spec), splits(made[0].trace.spec, 1)):
        found = merged(made, matching, split, x, fit)
        torch.testing.assert_close(found(x), pair[0](x), rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_everything_separate_gives_the_sources_side_by_side(family, sources, tmp_path):
    make, x = family
    networks = [make(0), make(1)]
    made = sources(networks, x, "separate")
    spec = made[0].trace.spec
    split = full_split(spec, dict.fromkeys(spec.free, ()))
    matching = identity_matching(spec, 2)
    for fit in (AVERAGE, PROGRESSIVE):
        found = merged(made, matching, split, x, fit, "separate")
        recompute_statistics(found, batches(x))  # leaves copies alone
        name = found.head.inputs[0]
        features = found.features(x)
        for source, positions in zip(made, found.parts(name).positions, strict=True):
            torch.testing.assert_close(features[:, positions], alone(source, x)[name], rtol=1e-8, atol=1e-8)
        for source, task in zip(networks, "ab", strict=True):
            if fit is AVERAGE:  # the heads are the sources' own
                torch.testing.assert_close(found(x, task=task), source(x), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_the_cost_is_counted_alike_by_formula_model_and_blocks_and_a_file_gives_it_back(
    family, sources, splits, tmp_path
):
    make, x = family
    made = sources([make(0), make(1)], x)
    spec, state = made[0].trace.spec, made[0].state
    for seed in range(4):
        split = splits(spec, seed)
        found = merged(made, identity_matching(spec, 2), split, x, AVERAGE)
        shared = {name: len(s.shared) for name, s in split.items()}
        for kind in ("macs", "parameters"):
            counted = built_cost(found, kind)
            assert counted == split_cost(made[0].trace, state, "shared", kind, shared, 2)
            model = cost_model(made[0].trace, state, "shared", kind, 2)
            assert counted == model.cost({name: len(s.separate) for name, s in split.items()})
        with FlopCounterMode(display=False) as counter:
            found(x[:1])
        attention = sum(
            found.trace.hidden_macs(n) * found.parts(n.name).width for n in found.trace.graph.nodes
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
def test_a_fit_holds_what_was_predicted(family, sources, splits, fit, monkeypatch):
    monkeypatch.setattr("stages.fit.layerwise.CHUNK", 2**15)
    make, x = family
    made = sources([make(0), make(1)], x)
    shared = {name: len(split.shared) for name, split in splits(made[0].trace.spec, 1).items()}
    network = MergedNetwork(made[0].trace, [source.task for source in made], "shared", shared).double()
    fill_average(network, made)
    own = torch.randn(60, *x.shape[1:], dtype=x.dtype)
    data = images_to_batches([own, own.clone()], 2)
    fitter = Fitter(network, made, fit, 1e-3)
    running = network if fit.inputs == "merged" else None
    promised = peak_bytes(made[0].trace, 2, data, fitter, running, x.dtype)
    sweep = Sweep(made, data, running, x.dtype)
    with Live() as live:
        sweep.run(fitter)
    found = live.peak + sum(batch.images.nbytes for batch in data)
    assert found <= 1.05 * promised


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_independent_networks_merge_at_any_budget(family, by):
    make, x = family
    networks, images = {"a": make(0), "b": make(1)}, {"a": [x[:3]], "b": [x[3:]]}
    for budget in (1.0, 1.4, 2.0):
        match = {"by": by}
        found = merge(networks, images, budget, match=match, progress=False)
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
