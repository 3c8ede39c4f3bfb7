import pytest
import torch
from families import FAMILIES, Normed, Written, spread
from live import Live

from stages.core.networks.architectures import build
from stages.core.recipe.known import known_methods
from stages.core.runtime.errors import InputError
from stages.core.sweep.batches import Batch, images_to_batches
from stages.core.sweep.memory import peak_bytes
from stages.core.sweep.sweep import Sweep
from stages.core.units.moments import pool
from stages.match.matching import make_matching
from stages.statistics.moments import MomentsVisitor, gather
from stages.statistics.points import points


def features_of(network, layers, x):
    """What the named layers read, by forward hooks."""
    found, handles = {}, []
    for name in layers:
        hook = lambda module, inputs, name=name: found.update({name: inputs[0].detach()})  # noqa: E731
        handles.append(network.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return found


def channels(x):
    return x.movedim(1, -1).flatten(0, -2)


def small_features(network, x):
    """Rows of each group of the small network, place by place: where a layer reads it."""
    read = features_of(network, ["conv2", "conv3", "conv4", "hidden", "fc"], x)
    stream, branch = read["conv4"].split([4, 5], 1)
    return {
        "conv1": [channels(v) for v in (read["conv2"], read["conv3"], stream)],
        "conv3": [channels(branch)],
        "conv4": [channels(read["hidden"].view(len(x), 3, 4))],  # three maps of 2 x 2, flattened
        "hidden": [read["fc"]],
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_moments_are_those_of_the_hooked_features(small, images, sources, dtype, tolerance):
    networks = [small(m).to(dtype) for m in range(3)]
    tasks = [images(n, n).to(dtype) for n in (7, 4, 5)]
    made = sources(networks, tasks[0])
    found = gather(made, images_to_batches(tasks, 3), precision=dtype)["after"]
    assert set(found) == set(made[0].trace.spec.free)
    for task, x in enumerate(tasks):
        rows = [small_features(network.double(), x.double()) for network in networks]
        for group, moments in found.items():
            joint = [torch.cat(place, 1) for place in zip(*(own[group] for own in rows), strict=True)]
            mean = sum(place.mean(0) for place in joint) / len(joint)
            second = sum(place.T @ place / len(place) for place in joint) / len(joint)
            assert moments.mean.dtype == moments.second.dtype == torch.float64
            torch.testing.assert_close(moments.mean[task], mean, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(moments.second[task], second, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("block", [2, 512])
def test_pairs_alone_are_those_of_all(small, images, sources, monkeypatch, block):
    """Three networks; what is left out is nothing that a permutation is found, judged or valued by."""
    monkeypatch.setattr("stages.core.sweep.gram.BLOCK", block)
    tasks = [images(n, n) for n in (7, 4, 5)]
    made, batches = sources([small(m) for m in range(3)], tasks[0]), images_to_batches(tasks, 3)
    whole, pairs = (gather(made, batches, precision=torch.float64, pairs_only=only) for only in (False, True))
    assert whole["before"]
    assert not pairs["before"]
    for point in ("after", "inside"):
        assert set(whole[point]) == set(pairs[point])
        for group, own in whole[point].items():
            network = torch.arange(own.second.shape[-1]) * 3 // own.second.shape[-1]
            kept = (network[:, None] != network) | torch.eye(len(network), dtype=torch.bool)
            torch.testing.assert_close(pairs[point][group].second, own.second * kept)
            torch.testing.assert_close(pairs[point][group].mean, own.mean)
    for name in ("activations", "weights", "mudsc", "c2m3"):
        settings = known_methods().match[name]
        found = [make_matching(made, settings, pool(own, 3, 3), torch.Generator()) for own in (whole, pairs)]
        for (one, value), (other, other_value) in [found]:
            assert all(torch.equal(one.units[g], other.units[g]) for g in one.units)
            assert all(torch.allclose(one.similarity[g], other.similarity[g]) for g in one.similarity)
            assert all(torch.allclose(value[g], other_value[g]) for g in value)


def test_units_inside_parts_are_seen_one_by_one_where_a_layer_reads_them(randomise, sources):
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    networks = [randomise(Normed(lambda c: torch.nn.GroupNorm(2, c)), m) for m in (0, 1)]
    found = gather(sources(networks, x), images_to_batches([x, x], 2), precision=torch.float64)["inside"]
    rows = [features_of(network, ["branch", "back", "fc"], x) for network in networks]
    branch = torch.cat([channels(own["back"]) for own in rows], 1)
    torch.testing.assert_close(found["branch"].second[0], branch.T @ branch / len(branch))
    stream = [torch.cat([channels(own[name]) for own in rows], 1) for name in ("branch", "fc")]
    expected = sum(place.T @ place / len(place) for place in stream) / 2  # places count alike
    torch.testing.assert_close(found["stem"].second[1], expected)
    assert set(found) == {"stem", "branch"}


def test_queries_and_keys_are_seen_where_they_are_written(randomise, sources):
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    networks = [randomise(Written(), m) for m in (0, 1)]
    found = gather(sources(networks, x), images_to_batches([x, x], 2), precision=torch.float64)["inside"]
    rows = [n.qkv(features_of(n, ["qkv"], x)["qkv"]).detach().flatten(0, 1).split(8, 1) for n in networks]
    places = [torch.cat([own[i] for own in rows], 1) for i in (0, 1)]
    expected = sum(place.T @ place / len(place) for place in places) / 2
    query = next(name for name in found if name.endswith("query"))
    torch.testing.assert_close(found[query].second[0], expected)
    value = torch.cat([features_of(n, ["out"], x)["out"].flatten(0, 1) for n in networks], 1)
    (value_name,) = set(found) - {query}
    torch.testing.assert_close(found[value_name].second[1], value.T @ value / len(value))


@pytest.mark.parametrize("name", ["resnext", "grouped", "group norm", "vit"])
def test_statistics_hold_what_was_predicted(name, randomise, sources, monkeypatch):
    monkeypatch.setattr("stages.statistics.moments.ENTRIES_AT_A_TIME", 2**15)
    make, side = FAMILIES[name]
    x = torch.randn(60, 3, side, side, dtype=torch.float64)
    made = sources([spread(randomise(make(), m), m) for m in (0, 1)], x[:2])
    batches = images_to_batches([x, x.clone()], 2)
    visitor = MomentsVisitor(made[0].trace, 2, 2, 1.0, torch.Generator(), 8)
    sweep = Sweep(made, batches, None, x.dtype)
    promised = peak_bytes(sweep, visitor)
    with Live() as live:
        sweep.run(visitor)
    assert live.peak + sum(batch.images.nbytes for batch in batches) <= 1.05 * promised


def test_before_is_in_front_of_the_non_linearity(small, images, sources):
    networks, x = [small(0), small(1)], images(5)
    found = gather(sources(networks, x), [Batch(x, 0), Batch(x, 1)], precision=torch.float64)["before"]
    rows = []
    for network in networks:
        stem = network.bn1(network.conv1(x))
        stream = stem.relu() + network.bn2(network.conv2(stem.relu()))
        rows.append([channels(stem), channels(stream)])
    joint = [torch.cat(place, 1) for place in zip(*rows, strict=True)]
    second = sum(place.T @ place / len(place) for place in joint) / 2
    torch.testing.assert_close(found["conv1"].second[0], second.detach())
    branch = [channels(n.bn3(n.conv3(features_of(n, ["conv3"], x)["conv3"]))) for n in networks]
    torch.testing.assert_close(found["conv3"].mean[0], torch.cat(branch, 1).mean(0).detach())
    hidden = torch.cat([n.hidden(features_of(n, ["hidden"], x)["hidden"]) for n in networks], 1).detach()
    torch.testing.assert_close(found["hidden"].second[1], hidden.T @ hidden / len(hidden))


def test_a_value_that_two_layers_read_counts_once(randomise, sources):
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    networks = [randomise(build("resnet", {"depth": 8, "width": 3, "classes": 3}), m) for m in (0, 1)]
    found = gather(sources(networks, x), images_to_batches([x, x], 2), precision=torch.float64)["after"]
    rows = []
    for network in networks:  # layer2.0.conv1 and its shortcut read the same
        read = features_of(network, ["layer1.0.conv1", "layer2.0.conv1"], x)
        rows.append(torch.cat([channels(value) for value in read.values()]))
    joint = torch.cat(rows, 1)  # two places of as many rows
    torch.testing.assert_close(found["conv1"].second[1], joint.T @ joint / len(joint))


def test_every_free_group_is_seen_somewhere(small, images, sources):
    trace = sources([small(0), small(1)], images())[0].trace
    for kind in ("after", "before"):
        values = [value for visited in points(trace).values() for place, value in visited if place == kind]
        assert len(values) == len(set(values))
        seen = {segment.group for value in values for segment in trace.layouts[value].segments}
        assert seen >= set(trace.spec.free)


def test_how_images_are_split_into_batches_does_not_matter(small, images, sources):
    made, tasks = sources([small(0), small(1)], images()), [images(9, 0), images(5, 1)]
    one, other = (
        gather(made, images_to_batches(tasks, size), precision=torch.float64)["after"] for size in (9, 2)
    )
    for group, moments in one.items():
        torch.testing.assert_close(other[group].second, moments.second)


def test_a_share_of_the_positions_estimates_the_whole(small, images, sources):
    made, tasks = sources([small(0), small(1)], images()), [images(200, 0), images(200, 1)]
    batches = images_to_batches(tasks, 50)
    found = []
    for share in (1.0, 0.25):
        visitor = MomentsVisitor(made[0].trace, 2, 2, share, torch.Generator().manual_seed(0))
        Sweep(made, batches).run(visitor)
        found.append(visitor.moments()["after"])
    for group, whole in found[0].items():
        error = (found[1][group].second - whole.second).norm() / whole.second.norm()
        assert error < 0.1
        if group == "hidden":  # a vector has no positions to leave out
            assert torch.equal(found[1][group].second, whole.second)
        else:
            assert error > 0


def test_the_same_positions_are_drawn_again(small, images, sources):
    made = sources([small(0), small(1)], images())
    batches = images_to_batches([images(8, 0), images(8, 1)], 4)
    draw = lambda seed: gather(  # noqa: E731
        made, batches, positions=0.3, generator=torch.Generator().manual_seed(seed)
    )["after"]
    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[group].second, again[group].second) for group in first)
    assert not torch.equal(first["conv1"].second, other["conv1"].second)


def test_narrow_precision_comes_close(small, images, sources):
    made = sources([small(0), small(1)], images())
    batches = images_to_batches([images(20, 0), images(20, 1)], 10)
    wide, narrow = (gather(made, batches, precision=s)["after"] for s in (torch.float64, torch.bfloat16))
    for group in wide:
        error = (narrow[group].second - wide[group].second).norm() / wide[group].second.norm()
        assert 0 < error < 0.02


def test_statistics_that_will_not_fit_in_memory_are_refused(small, images, sources):
    made = sources([small(0), small(1)], images())
    with pytest.raises(InputError, match=r"^statistics: needs"):
        gather(made, images_to_batches([images(), images()], 2), memory=1e-6)
