"""Accuracies, probes, references and latency."""

import time

import pytest
import torch

from stages.core.merged.network import MergedNetwork
from stages.core.recipe.methods import Fit
from stages.core.recipe.sections import ProbeSection
from stages.core.runtime.progress import Bar
from stages.core.sweep.batches import images_to_batches
from stages.core.units.matching import full_split, identity_matching
from stages.fit.network import fit_network
from stages.probe.__main__ import REUSED, Watched, at_once
from stages.probe.candidates import merged_row, reference_row
from stages.probe.evaluate import Ensemble, OneForAll, Oracle, collect, evaluate, linear_probe
from stages.probe.latency import relative_latency


@pytest.fixture
def two(small, images, sources):
    """(labels) -> sources whose heads have 2 and 3 classes, or 3 each."""

    def make(labels):
        classes = (2, 3) if labels == "separate" else (3, 3)
        return sources([small(m, c) for m, c in enumerate(classes)], images(), labels)

    return make


def side_by_side(made, images, labels):
    spec = made[0].trace.spec
    kept = dict.fromkeys(spec.free, ())
    batches = images_to_batches([images(4, 0), images(4, 1)], 4)
    fit = Fit(solver="average")
    network, _ = fit_network(
        made, identity_matching(spec, 2), full_split(spec, kept), batches, fit, labels=labels,
        about={"budget": {"asked": 2.0}},
    )  # fmt: skip
    return network


@torch.no_grad()
@pytest.mark.parametrize("labels", ["shared", "separate"])
def test_everything_separate_is_the_ensemble(two, images, labels):
    made = two(labels)
    merged, ensemble = OneForAll(side_by_side(made, images, labels)), Ensemble(made, labels)
    x = images(6, 5)
    for task in (0, 1):
        torch.testing.assert_close(merged.run(x, task)[0], ensemble.run(x, task)[0])


@torch.no_grad()
@pytest.mark.parametrize("labels", ["shared", "separate"])
@pytest.mark.parametrize("corrected", [False, True])
def test_what_is_probed_is_what_the_network_gives(two, images, labels, corrected):
    network = side_by_side(two(labels), images, labels)
    if corrected:
        node = network.trace.graph.nodes[1]
        network.set_correction(
            node, torch.rand(2, 2, network.arrangement(node.name).width, dtype=torch.float64)
        )
    x = images(6, 5)
    for task, name in enumerate(own.name for own in network.tasks):
        told = name if corrected else None
        logits, features = OneForAll(network).run(x, task)
        expected = network(x) if labels == "separate" else network(x, told)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(features, network.features(x, told).flatten(1))
        if labels == "separate":
            own = logits[:, [slice(0, 2), slice(2, 5)][task]]
            torch.testing.assert_close(own, network(x, name))


@torch.no_grad()
@pytest.mark.parametrize("labels", ["shared", "separate"])
def test_the_oracle_knows_the_task(two, images, labels):
    made, x = two(labels), images(6, 5)
    for task, start in ((0, 0), (1, 2)):
        logits, features = Oracle(made, labels).run(x, task)
        assert torch.equal(logits.argmax(1) - start * (labels == "separate"), made[task](x).argmax(1))
        assert torch.equal(features, made[task].features(x).flatten(1))


@torch.no_grad()
def test_accuracy_counts_right_answers_over_uneven_batches(two, images):
    made, x = two("separate"), images(7, 5)
    truth = made[1](x).argmax(1)
    truth[2] = (truth[2] + 1) % 3
    data = {
        split: [(list(x.split(3)), truth.clamp(max=1)), (list(x.split(3)), truth)]
        for split in ("train", "test")
    }
    candidate = Ensemble(made, "separate")
    found = evaluate(candidate, data, [("a", 2), ("b", 3)], True, 0.1)["b"]
    assert found["accuracy"] == pytest.approx(100 * 6 / 7, abs=1e-3)
    joint = candidate.run(x, 1)[0].argmax(1) - 2
    assert found["joint"] == pytest.approx(100 * float((joint == truth).float().mean()), abs=1e-3)


def test_a_linear_probe_learns_what_is_linear_and_no_more():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=generator)
    linear, other = (x[:, 0] > 0).long(), torch.randint(0, 2, (600,), generator=generator)
    assert linear_probe(x[:400], linear[:400], x[400:], linear[400:], 1e-3) > 97
    assert linear_probe(x[:400], other[:400], x[400:], other[400:], 1e-3) < 65


def test_every_image_passes_once(two, images, monkeypatch):
    made = two("shared")
    network = side_by_side(made, images, "shared")
    seen = []
    features = MergedNetwork.features
    monkeypatch.setattr(
        MergedNetwork, "features", lambda self, x, *a: seen.append(len(x)) or features(self, x, *a)
    )
    x, labels = images(6, 0), torch.tensor([0, 1, 2, 0, 1, 2])
    data = {split: [(list(x.split(4)), labels)] * 2 for split in ("train", "test")}
    found = evaluate(OneForAll(network), data, [("a", 3), ("b", 3)], False, 0.1)
    assert sum(seen) == 2 * 2 * 6  # two tasks, train and test, six images
    assert set(found) == {"a", "b"}
    assert set(found["a"]) == {"accuracy", "probe"}
    logits, features = collect(OneForAll(network), x.split(4), 0)
    assert (logits.shape, features.shape) == ((6, 3), (6, 12))


def test_rows_say_what_they_cost(two, images, tmp_path):
    made = two("shared")
    for name, macs in (("oracle", 1.0), ("ensemble", 2.0)):
        row = reference_row(name, made, "shared")
        assert row.cost == {"macs": macs, "parameters": 2.0}
    hashed = [type(s)(s.trace, s.state, s.task, {"sha256": s.task.name}) for s in made]
    side_by_side(hashed, images, "shared").save(tmp_path / "m.safetensors")
    row = merged_row(tmp_path / "m.safetensors", hashed, "shared", torch.device("cpu"))
    assert row.cost["macs"] == 2.0
    assert row.budget == 2.0
    other = [type(s)(s.trace, s.state, s.task, {"sha256": "x"}) for s in made]
    with pytest.raises(ValueError, match="made from another network for task a"):
        merged_row(tmp_path / "m.safetensors", other, "shared", torch.device("cpu"))


def test_latency_is_relative_to_one_source():
    def takes(seconds):
        return lambda x: time.sleep(seconds)

    found = relative_latency(takes(0.03), [takes(0.01), takes(0.01)], torch.zeros(1), 5)
    assert 2 < found < 4


def test_at_budget_two_latency_is_that_of_both_sources():
    """At most 1.25 times running both; measured on a network wide enough for its kernels to count."""
    from stages.core.graph.source import Task
    from stages.core.networks.architectures import build
    from stages.core.tracing.sources import make_sources

    networks = [build("resnet", {"depth": 8, "width": 32, "channels": 1, "classes": 10}).eval() for _ in "ab"]
    x = torch.randn(16, 1, 16, 16)
    made = make_sources(networks, [Task(n, tuple("0123456789")) for n in "ab"], x, "shared")
    network = side_by_side(made, lambda n, seed: x[:n], "shared")

    def both(y):
        return [source(y) for source in made]

    found = min(relative_latency(network, [both], x, 15) for _ in range(3))
    assert found <= 1.25


def test_no_more_test_images_than_asked_for(tmp_path, monkeypatch):
    from pathlib import Path

    import yaml

    from stages.artifacts.__main__ import main as artifacts
    from stages.core.settings.params import parse_params
    from stages.probe.__main__ import labelled

    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(content))
    artifacts()
    for asked, expected in ((None, 500), (30, 30)):
        content["probe"]["test_images"] = asked
        for batches, labels in labelled(
            parse_params(content), ProbeSection.model_validate(content["probe"]), "test", torch.device("cpu")
        ):
            assert sum(map(len, batches)) == len(labels) == expected


def test_images_are_counted_as_they_go_by():
    batches, bar = [torch.zeros(4, 1), torch.zeros(2, 1)], Bar(total=12, unit="image")
    for _ in range(2):
        assert [len(x) for x in Watched(batches, bar)] == [4, 2]
    assert bar.n == bar.total


def test_large_images_are_run_a_few_at_once(sources, small, images):
    own = sources([small(0), small(1)], images())
    largest = max(shape.numel() for shape in own[0].trace.shapes.values())
    assert at_once(250, own, torch.device("cpu")) == 250
    own[0].trace.shapes["large"] = torch.Size([1, REUSED // 4 // 7])
    assert largest < REUSED // 4 // 7
    assert at_once(250, own, torch.device("cpu")) == 7
    assert at_once(5, own, torch.device("cpu")) == 5
    own[0].trace.shapes["larger"] = torch.Size([1, REUSED])
    assert at_once(250, own, torch.device("cpu")) == 1
    assert at_once(250, own, torch.device("cuda")) == 250
