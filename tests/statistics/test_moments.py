import pytest
import torch

from stages.core.architectures import build
from stages.core.errors import InputError
from stages.core.sweep import Sweep, images_to_batches
from stages.statistics.moments import MomentsVisitor, gather, places


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
    """Rows of each group of the small network: every place where a layer reads it."""
    read = features_of(network, ["conv2", "conv3", "conv4", "hidden", "fc"], x)
    stream, branch = read["conv4"].split([4, 5], 1)
    return {
        "conv1": torch.cat([channels(v) for v in (read["conv2"], read["conv3"], stream)]),
        "conv3": channels(branch),
        "conv4": channels(read["hidden"].view(len(x), 3, 4)),  # three maps of 2 x 2, flattened
        "hidden": read["fc"],
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_moments_are_those_of_the_hooked_features(small, images, sources, dtype, tolerance):
    networks = [small(m).to(dtype) for m in range(3)]
    tasks = [images(n, n).to(dtype) for n in (7, 4, 5)]
    made = sources(networks, tasks[0])
    found = gather(made, images_to_batches(tasks, 3), storage=dtype)
    assert set(found) == set(made[0].trace.spec.free)
    for task, x in enumerate(tasks):
        rows = [small_features(network.double(), x.double()) for network in networks]
        for group, moments in found.items():
            joint = torch.cat([own[group] for own in rows], 1)  # (rows, N d)
            assert moments.mean.dtype == moments.second.dtype == torch.float64
            torch.testing.assert_close(moments.mean[task], joint.mean(0), rtol=tolerance, atol=tolerance)
            second = joint.T @ joint / len(joint)
            torch.testing.assert_close(moments.second[task], second, rtol=tolerance, atol=tolerance)


def test_a_value_that_two_layers_read_counts_once(randomise, sources):
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    networks = [randomise(build("resnet", {"depth": 8, "width": 3, "classes": 3}), m) for m in (0, 1)]
    found = gather(sources(networks, x), images_to_batches([x, x], 2), storage=torch.float64)
    rows = []
    for network in networks:  # layer2.0.conv1 and its shortcut read the same
        read = features_of(network, ["layer1.0.conv1", "layer2.0.conv1"], x)
        rows.append(torch.cat([channels(value) for value in read.values()]))
    joint = torch.cat(rows, 1)
    torch.testing.assert_close(found["conv1"].second[1], joint.T @ joint / len(joint))


def test_every_free_group_is_seen_somewhere(small, images, sources):
    trace = sources([small(0), small(1)], images())[0].trace
    values = [value for visited in places(trace).values() for value in visited]
    assert len(values) == len(set(values))
    seen = {segment.group for value in values for segment in trace.layouts[value].segments}
    assert seen >= set(trace.spec.free)


def test_how_images_are_split_into_batches_does_not_matter(small, images, sources):
    made, tasks = sources([small(0), small(1)], images()), [images(9, 0), images(5, 1)]
    one, other = (gather(made, images_to_batches(tasks, size), storage=torch.float64) for size in (9, 2))
    for group, moments in one.items():
        torch.testing.assert_close(other[group].second, moments.second)


def test_a_share_of_the_positions_estimates_the_whole(small, images, sources):
    made, tasks = sources([small(0), small(1)], images()), [images(200, 0), images(200, 1)]
    batches = images_to_batches(tasks, 50)
    counts, seconds = [], []
    for share in (1.0, 0.25):
        visitor = MomentsVisitor(made[0].trace, 2, 2, share, torch.Generator().manual_seed(0))
        Sweep(made, batches).run(visitor)
        counts.append({group: sums.count.clone() for group, sums in visitor.sums.items()})
        seconds.append({group: moments.second for group, moments in visitor.moments().items()})
    whole = {"conv1": 64 + 64 + 16, "conv3": 16, "conv4": 4, "hidden": 1}
    for group, positions in whole.items():
        kept = 1 if positions == 1 else 0.25  # a vector has no positions to leave out
        assert counts[0][group].tolist() == [200 * positions] * 2
        assert counts[1][group].tolist() == pytest.approx([200 * positions * kept] * 2, rel=0.01)
        error = (seconds[1][group] - seconds[0][group]).norm() / seconds[0][group].norm()
        assert error < 0.1


def test_the_same_positions_are_drawn_again(small, images, sources):
    made = sources([small(0), small(1)], images())
    batches = images_to_batches([images(8, 0), images(8, 1)], 4)
    draw = lambda seed: gather(made, batches, positions=0.3, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[group].second, again[group].second) for group in first)
    assert not torch.equal(first["conv1"].second, other["conv1"].second)


def test_narrow_storage_comes_close(small, images, sources):
    made = sources([small(0), small(1)], images())
    batches = images_to_batches([images(20, 0), images(20, 1)], 10)
    wide, narrow = (gather(made, batches, storage=s) for s in (torch.float64, torch.bfloat16))
    for group in wide:
        error = (narrow[group].second - wide[group].second).norm() / wide[group].second.norm()
        assert 0 < error < 0.02


def test_statistics_that_will_not_fit_in_memory_are_refused(small, images, sources):
    made = sources([small(0), small(1)], images())
    with pytest.raises(InputError, match=r"^statistics: needs"):
        gather(made, images_to_batches([images(), images()], 2), memory=1e-6)
