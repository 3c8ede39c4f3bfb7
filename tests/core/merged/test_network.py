import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from stages.core.graph.layouts import Layout, Segment
from stages.core.graph.nodes import Node
from stages.core.graph.source import Task
from stages.core.merged.arrangement import arrange, arrange_heads, held_pieces
from stages.core.merged.blocks import BlockMap
from stages.core.merged.copies import exact_entries
from stages.core.merged.file import load_merged
from stages.core.merged.network import MergedNetwork
from stages.core.merged.seal import SEAL, seal_of
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_tensors, write_tensors
from stages.core.tracing.trace import trace
from stages.core.units.matching import full_split

CONV = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}


@st.composite
def merged_layouts(draw, networks):
    """A layout, the shared units of its groups, and by hand: each merged entry's owner and (network, unit) names."""
    segments, shared, owners, names = [], {}, [], []
    for index in range(draw(st.integers(1, 2))):
        d, block = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        k = draw(st.integers(0, d))
        segments.append(Segment(f"g{index}", d, block))
        shared[f"g{index}"] = k
        for owner in [0, -1, *range(1, networks)]:
            units = range(k) if owner < 0 else range(k, d)
            owners += [owner] * len(units) * block
            names += [(owner, index, unit, i) for unit in units for i in range(block)]
    return Layout(1, tuple(segments)), shared, owners, names


def source_names(layout):
    """The entries of a source's value: shared units first, then separate ones, as the aligned sources have them."""
    return [(i, u, b) for i, s in enumerate(layout.segments) for u in range(s.size) for b in range(s.block)]


@given(data=st.data(), networks=st.integers(2, 3))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_source_entry_has_its_place(data, networks):
    layout, shared, owners, names = data.draw(merged_layouts(networks))
    parts = arrange(layout, shared, networks)
    assert parts.owner.tolist() == owners
    for m, positions in enumerate(parts.positions):
        placed = [names[position] for position in positions.tolist()]
        assert [name[1:] for name in placed] == source_names(layout)
        assert all(owner == (m if unit >= shared[f"g{i}"] else -1) for owner, i, unit, _ in placed)
        assert parts.view(m).tolist() == sorted(positions.tolist())


@given(d=st.integers(1, 6), k=st.integers(0, 6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_views_of_two_networks_are_slices(d, k):
    parts = arrange(Layout(1, (Segment("g", d),)), {"g": min(k, d)}, 2)
    first, second = parts.view(0), parts.view(1)
    assert first.tolist() == list(range(d))
    assert second.tolist() == list(range(parts.width - d, parts.width))


def allowed(inputs, outputs):
    """The blocks that exist, entry by entry: bool (d_out, d_in)."""
    return torch.tensor([[o < 0 or i < 0 or i == o for i in inputs] for o in outputs])


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def dense(module, kernel=()):
    """The map with its missing blocks as zeros, and how many blocks cover each entry."""
    weight = torch.zeros(module.outputs.width, module.inputs.width, *kernel, dtype=torch.float64)
    covered = torch.zeros(weight.shape[:2])
    for block, own in zip(module.blocks, module.weights, strict=True):
        weight[block.start : block.stop, block.columns] = own.detach()
        covered[block.start : block.stop, block.columns] += 1
    return weight, covered


@given(data=st.data(), networks=st.integers(2, 3), conv=st.booleans(), bias=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
@torch.no_grad()
def test_the_blocks_are_exactly_the_allowed_pairs(data, networks, conv, bias):
    reads, k_in, owners_in, _ = data.draw(merged_layouts(networks))
    writes, k_out, owners_out, _ = data.draw(merged_layouts(networks))
    node = Node("n", "conv2d", ("x",), CONV) if conv else Node("n", "linear", ("x",))
    kernel = (3, 3) if conv else ()
    parts = arrange(reads, k_in, networks), arrange(writes, k_out, networks)
    module = randomised(BlockMap(node, *parts, kernel, bias))
    weight, covered = dense(module, kernel)
    assert torch.equal(covered, allowed(owners_in, owners_out).float())
    assert sum(w.numel() for w in module.weights) == covered.sum() * (9 if conv else 1)
    x = torch.randn(2, len(owners_in), *([4, 5] if conv else []), dtype=torch.float64)
    expected = F.conv2d(x, weight, module.bias, padding=1) if conv else F.linear(x, weight, module.bias)
    torch.testing.assert_close(module(x), expected)
    pieces = module.on_pieces(apart(x, parts[0]))
    torch.testing.assert_close(torch.cat(pieces, 1), expected)


def apart(x, parts):
    """A value in the pieces that a running network holds."""
    return [x[:, piece.start : piece.stop] for piece in held_pieces(parts)]


@given(data=st.data(), classes=st.lists(st.integers(1, 4), min_size=2, max_size=3))
@settings(max_examples=25, deadline=None, derandomize=True)
@torch.no_grad()
def test_a_task_reads_its_own_head(data, classes):
    reads, shared, owners, _ = data.draw(merged_layouts(len(classes)))
    parts = arrange(reads, shared, len(classes)), arrange_heads(classes)
    module = randomised(BlockMap(Node("fc", "linear", ("x",)), *parts, (), True))
    owner = [m for m, count in enumerate(classes) for _ in range(count)]
    weight, covered = dense(module)
    assert torch.equal(covered, allowed(owners, owner).float())
    x = torch.randn(5, len(owners), dtype=torch.float64)
    expected = F.linear(x, weight, module.bias).split(classes, 1)
    for m, own in enumerate(expected):
        torch.testing.assert_close(module.on_pieces(apart(x, parts[0]), m)[0], own)


# -- whole networks -----------------------------------------------------------------------------------------------


def task_list(classes):
    return [Task(f"task{m}", tuple(f"{m}.{c}" for c in range(n))) for m, n in enumerate(classes)]


@pytest.fixture
def merged(small, images, splits):
    """(classes per task, labels, seed) -> a merged network with random weights and a random split."""

    def make(classes=(3, 3), labels="shared", seed=0, about=None):
        network = small(0, classes[0])
        traced = trace(network, images())
        chosen = splits(traced.spec, seed)
        shared = {name: len(split.shared) for name, split in chosen.items()}
        units = {name: torch.randint(9, (len(classes), split.size)) for name, split in chosen.items()}
        result = MergedNetwork(traced, task_list(classes), labels, shared, units, about).double()
        for name, buffer in result.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        return randomised(result)

    return make


@torch.no_grad()
def test_heads_lie_side_by_side_in_the_order_of_the_tasks(merged, images):
    network = merged((2, 4, 3), "separate")
    heads = [network(images(), task=f"task{m}") for m in range(3)]
    assert [head.shape for head in heads] == [(4, 2), (4, 4), (4, 3)]
    torch.testing.assert_close(torch.cat(heads, 1), network(images()))


def test_a_wrong_task_is_refused_and_the_right_ones_named(merged, images):
    with pytest.raises(InputError, match="'birds'; allowed: task0, task1"):
        merged((2, 4), "separate")(images(), task="birds")
    with pytest.raises(InputError, match="'task0'; allowed: none"):
        merged((3, 3), "shared")(images(), task="task0")


def test_a_network_on_the_meta_device_tells_its_shapes(merged, images):
    network = merged([3, 4], "separate").to("meta")
    with torch.no_grad():
        assert network(images().double().to("meta")).shape == (len(images()), 7)


@pytest.mark.parametrize("fold", ["no", 5, None, 1.0])
def test_fold_is_yes_or_no(merged, fold):
    with pytest.raises(InputError, match=r"^fold: found .*; allowed: True, False$"):
        merged([3, 4], "separate").plain(fold=fold)


def test_torch_script_compiles_the_plain_network(merged, images):
    network = merged([3, 4], "separate")
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(network)(images()), network(images()))


def _norm(network):
    return next(own for own in network.modules() if isinstance(own, nn.BatchNorm2d))


OTHER_LAYERS = {
    "a parameter of another shape": lambda n: setattr(
        _norm(n), "weight", nn.Parameter(torch.ones(2).double())
    ),
    "a layer in another's place": lambda n: n.maps.update({list(n.maps)[-1]: nn.Linear(2, 2).double()}),
    "a layer less": lambda n: n.maps.pop(next(iter(n.maps))),
    "a layer more": lambda n: n.add_module("extra", nn.Linear(2, 2).double()),
    "a buffer more": lambda n: n.register_buffer("mean", torch.ones(3).double()),
    "pruned": lambda n: prune.random_unstructured(_norm(n), "weight", 0.5),
    "parametrised": lambda n: nn.utils.parametrizations.weight_norm(_norm(n), "weight"),
    "a text about it": lambda n: setattr(n, "about", "mine"),
    "a tensor about it": lambda n: n.about.update(mine=torch.ones(2)),
}


@pytest.mark.parametrize("change", OTHER_LAYERS.values(), ids=OTHER_LAYERS)
def test_what_could_not_be_read_is_not_written(change, merged, tmp_path):
    network = merged([3, 4], "separate")
    network.save(path := tmp_path / "net.safetensors")
    before = path.read_bytes()
    change(network)
    with pytest.raises(InputError, match="; allowed: "):
        network.save(path)
    assert path.read_bytes() == before


def test_separate_label_spaces_need_a_linear_head():
    body = nn.Sequential(nn.Linear(4, 3), nn.GELU()).double()
    traced = trace(body, torch.zeros(1, 4))
    with pytest.raises(
        InputError, match="need a linear map whose outputs are the classes, up to the output; found gelu"
    ):
        MergedNetwork(traced, task_list((3, 3)), "separate", {"0": 3})


@torch.no_grad()
@pytest.mark.parametrize(("classes", "labels"), [((3, 3), "shared"), ((2, 4, 3), "separate")])
def test_the_features_are_what_the_head_reads(merged, images, classes, labels):
    network = merged(classes, labels, seed=2)
    features = network.features(images())
    head = network.map_of(network.head)
    assert features.shape == (4, head.inputs.width)
    torch.testing.assert_close(network(images()), F.linear(features, dense(head)[0], head.bias))


def test_features_of_a_network_without_a_head_are_refused():
    body = nn.Sequential(nn.Linear(4, 3), nn.GELU())
    network = MergedNetwork(trace(body, torch.zeros(1, 4)), task_list((3, 3)), "shared", {"0": 2})
    with pytest.raises(InputError, match="ends in gelu"):
        network.features(torch.zeros(1, 4))


@torch.no_grad()
def test_the_function_is_that_of_dense_layers_with_zeros_for_the_missing_blocks(merged, images):
    """Three networks, every value in merged order."""
    network = merged((3, 3, 3), "shared", seed=3)
    x = images()

    def conv(x, name, **settings):
        module = network.maps[f"{name}_"]
        weight, _ = dense(module, module.weights[0].shape[2:])
        return F.conv2d(x, weight, module.bias, **settings)

    def norm(x, name):
        m = network.maps[f"{name}_"]
        return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias)

    def linear(x, name):
        return F.linear(x, dense(network.maps[f"{name}_"])[0], network.maps[f"{name}_"].bias)

    x = F.relu(norm(conv(x, "conv1", padding=1), "bn1"))
    x = F.relu(x + norm(conv(x, "conv2", padding=2, dilation=2), "bn2"))
    y = F.relu(norm(conv(x, "conv3", stride=2, padding=(1, 0)), "bn3"))
    x = F.relu(conv(torch.cat([F.max_pool2d(x, 2), y], 1), "conv4"))
    x = F.relu(linear(F.avg_pool2d(x, 2).flatten(1), "hidden"))
    torch.testing.assert_close(network(images()), linear(x, "fc"))


@torch.no_grad()
def test_evaluation_leaves_the_statistics_alone(merged, images):
    network = merged()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network(images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# -- on disk ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("classes", "labels"), [((3, 3), "shared"), ((2, 4, 3), "separate")])
def test_a_loaded_network_is_the_saved_one(merged, images, tmp_path, classes, labels, dtype):
    network = merged(classes, labels, seed=4, about={"budget": {"asked": 1.25}, "method": "x"}).to(dtype)
    network.save(tmp_path / "merged.safetensors")
    loaded = load_merged(tmp_path / "merged.safetensors")
    x = images().to(dtype)
    assert torch.equal(loaded(x), network(x))
    assert torch.equal(loaded.features(x), network.features(x))
    assert (loaded.tasks, loaded.labels, loaded.shared) == (network.tasks, network.labels, network.shared)
    assert loaded.about == network.about
    assert loaded.trace.graph == network.trace.graph
    assert loaded.trace.layouts == network.trace.layouts
    assert loaded.units.keys() == network.units.keys()
    assert all(torch.equal(loaded.units[name], units) for name, units in network.units.items())
    assert not loaded.training
    if labels == "separate":
        assert torch.equal(loaded(x, task="task1"), network(x, task="task1"))


def test_saving_twice_gives_the_same_bytes(merged, tmp_path):
    network = merged(about={"b": 1, "a": 2})
    network.save(tmp_path / "one")
    load_merged(tmp_path / "one").save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def refused(path, message):
    with pytest.raises(InputError, match=message) as error:
        load_merged(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_hold_no_merged_network_are_refused(tmp_path):
    refused(tmp_path / "absent", "no such file")
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", "not a whole safetensors file")
    write_tensors(tmp_path / "plain", {"weight": torch.ones(2)})
    refused(tmp_path / "plain", "not a merged network")
    write_tensors(
        tmp_path / "other", {"weight": torch.ones(2)}, {"merged": json.dumps({"format": "merged-0"})}
    )
    refused(tmp_path / "other", "merged-0.*allowed: merged-network-3")


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_refused(merged, tmp_path, kept):
    merged().save(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[: int(kept * len(content))])
    refused(tmp_path / "cut", "not a whole safetensors file")


def write_sealed(path, tensors, header):
    """A file with a right seal, whatever it says."""
    text = json.dumps(header)
    write_tensors(path, {**tensors, SEAL: seal_of(text, tensors)}, {"merged": text})


DAMAGE = {
    "a tensor missing": lambda tensors, header: tensors.pop("maps.conv4_.bias"),
    "a tensor too many": lambda tensors, header: tensors.update(extra=torch.ones(2).double()),
    "a tensor of another shape": lambda tensors, header: tensors.update(
        {"maps.conv4_.bias": torch.ones(2).double()}
    ),
    "a key missing": lambda tensors, header: header.pop("labels"),
    "a node missing": lambda tensors, header: header["graph"].pop(3),
    "an unknown operation": lambda tensors, header: header["graph"][3].update(operation="crease"),
    "another split": lambda tensors, header: header["shared"].update(conv1=9),
    "a group missing": lambda tensors, header: header["shared"].pop("conv1"),
    "neither dense nor not": lambda tensors, header: header.update(dense="no"),
}


UNFIT = "its header and its tensors do not fit together"
SAID = {
    "a tensor missing": rf"{UNFIT} \(.*Missing key.*maps.conv4_.bias",
    "a tensor too many": rf"{UNFIT} \(.*Unexpected key.*extra",
    "a tensor of another shape": rf"{UNFIT} \(.*size mismatch for maps.conv4_.bias",
    "a key missing": rf"{UNFIT} \(.*labels",
    "a node missing": "conv2: reads 'relu', which is not there",
    "an unknown operation": "relu: no rule for crease",
    "another split": "group conv1: 9 shared units; allowed: from 0 to 4",
    "a group missing": rf"{UNFIT} \(.*conv1",
    "neither dense nor not": "dense: found 'no'; allowed: true, false",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_file_that_contradicts_itself_is_refused_in_one_line(merged, tmp_path, what):
    merged().save(tmp_path / "whole")
    tensors, metadata = read_tensors(tmp_path / "whole")
    header = json.loads(metadata["merged"])
    DAMAGE[what](tensors, header)
    write_sealed(tmp_path / "changed", tensors, header)
    refused(tmp_path / "changed", SAID[what])


def test_a_damaged_header_is_refused(tmp_path):
    write_tensors(tmp_path / "cut", {"weight": torch.ones(2)}, {"merged": '{"format": "merged-'})
    refused(tmp_path / "cut", f"{UNFIT}.*JSONDecodeError")


# -- copies of a source's entries ---------------------------------------------------------------------------------


def test_entries_are_copies_where_only_copies_are_read(small, images):
    network = small()
    traced = trace(network, images())
    none = dict.fromkeys(traced.spec.free, ())

    def exact(shared):
        sizes = {name: len(split.shared) for name, split in full_split(traced.spec, shared).items()}
        return exact_entries(MergedNetwork(traced, task_list((3, 3)), "shared", sizes))

    everything = exact(none)
    assert all(entries.all() for name, entries in everything.items() if name != "fc")
    assert not everything["fc"].any()  # a shared head is the mean of both
    some = exact({**none, "conv3": (0, 1)})
    assert some["conv3"].tolist() == [True] * 3 + [False] * 2 + [True] * 3
    assert some["bn1"].all()
    assert not some["conv4"].any()  # reads the two shared units


@pytest.mark.parametrize("labels", ["shared", "separate"])
def test_how_units_lie_in_a_value_is_computed_once(small, images, labels, monkeypatch):
    traced = trace(small(0), images())
    shared = {name: group.size // 2 for name, group in traced.spec.free.items()}
    merged = MergedNetwork(traced, [Task(n, ("0", "1", "2")) for n in "ab"], labels, shared)
    for function in ("arrange", "arrange_heads"):
        monkeypatch.setattr(f"stages.core.merged.network.{function}", None)
    for name in traced.layouts:
        assert merged.arrangement(name) is merged.arrangement(name)


def test_the_header_is_documented_field_by_field(merged, tmp_path):
    network, written = merged(), set()
    for network.dense in (True, False):
        network.save(tmp_path / "saved")
        _, metadata = read_tensors(tmp_path / "saved")
        written |= set(json.loads(metadata["merged"]))
    page = (Path(__file__).parents[3] / "docs/format.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == {SEAL, *written}
    assert f"`{json.loads(metadata['merged'])['format']}`" in page
