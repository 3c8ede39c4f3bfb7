"""Refining: never worse on what is held out, without labels, the same bytes twice, and copies that stay copies."""

import math

import pytest
import torch

from stages.core.align.alignment import Alignment
from stages.core.align.order import align
from stages.core.handover import calibration
from stages.core.images.batches import Pool
from stages.core.images.load import ImageSet
from stages.core.merged.copies import exact_entries
from stages.core.recipe.methods import Fit, Refine
from stages.core.runtime.errors import InputError
from stages.core.settings.profiles import Data
from stages.core.sweep.batches import NO_TASK, Batch
from stages.core.units.matching import Matching, full_split
from stages.fit import held_out
from stages.fit import refine as refining
from stages.fit.held_out import Look, take_apart
from stages.fit.network import fit_network
from stages.fit.refine import refine
from stages.fit.teachers import Teacher, values_at, watched_values

PROGRESSIVE = Fit(inputs="merged", targets="own", norm="fold")
FAST = Refine(steps=30, every=10, batch_size=8, learning_rate=1e-2)


def identity(spec, networks):
    units = {name: torch.arange(g.size).repeat(networks, 1) for name, g in spec.free.items()}
    return Matching(units, {})


@pytest.fixture
def fitted(small, images, sources):
    """(classes, labels, share, fit, per task) -> network, sources in merged order, images of each task."""

    def make(classes=(3, 3), labels="shared", share=True, fit=PROGRESSIVE, count=100):
        made = sources([small(seed, n) for seed, n in enumerate(classes)], images(), labels)
        spec = made[0].trace.spec
        matching = identity(spec, len(made))
        split = full_split(spec, None if share else dict.fromkeys(spec.free, ()))
        if share == "some":
            split = full_split(spec, {name: range(g.size // 2) for name, g in spec.free.items()})
        pools = [images(count, seed) + seed for seed in range(len(made))]  # tasks that can be told apart
        batches = [Batch(own, task) for task, own in enumerate(pools)]
        network, _ = fit_network(made, matching, split, batches, fit, labels=labels)
        return network, align(made, matching, split), pools

    return make


def tensors(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


# -- the loss -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_loss_is_its_three_terms_one_by_one(fitted):
    network, made, pools = fitted((3, 2), "separate")
    teacher = Teacher(network, made, Alignment(2), [1], watched_values(network.trace, "last"), joint=0.5)
    teacher.measure([pools[1]])
    x = pools[1][:5]
    found = teacher.losses(values_at(network, network.trace.graph, x, teacher.names), teacher(x))
    name = network.head.inputs[0]
    positions = network.arrangement(name).positions[1]
    f, own = made[1].features(x), network.features(x)[:, positions]
    variance = made[1].features(pools[1]).var(0, correction=0).mean()
    p, every = made[1](x).softmax(1), network(x)
    kl = (p * (p.log() - every[:, 3:].log_softmax(1))).sum(1)
    joint = -(p * every.log_softmax(1)[:, 3:]).sum(1)
    expected = (own - f).square().mean(1) / variance + kl + 0.5 * joint
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_network_that_says_what_its_owner_says_has_no_loss(small, images, sources, copies):
    networks, matching = copies(small(0), images(), 2)
    made = sources(networks, images())
    split = full_split(made[0].trace.spec)
    network, _ = fit_network(
        made, matching, split, [Batch(images(9), 0)], Fit(solver="average"), labels="shared"
    )
    for members in ([0], [1], [0, 1]):
        names = watched_values(network.trace, "stages")
        teacher = Teacher(network, align(made, matching, split), Alignment(2), members, names, 1.0)
        x = images(6, 3)
        losses = teacher.losses(values_at(network, network.trace.graph, x, names), teacher(x))
        torch.testing.assert_close(losses, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_stages_end_where_maps_get_smaller(fitted):
    network, _, _ = fitted()
    names = watched_values(network.trace, "stages")
    sizes = [tuple(network.trace.shapes[name][2:]) for name in names]
    convolved = [(8, 8), (4, 4)]  # the pooled map behind them is no stage
    assert sizes == convolved + [()] * (len(names) - 2)
    assert names[-1] == network.head.inputs[0]
    assert watched_values(network.trace, "none") == []


# -- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "labels", "share", "fit"),
    [
        ((3, 3), "shared", True, PROGRESSIVE),
        ((3, 3, 3), "shared", True, PROGRESSIVE),
        ((3, 2), "separate", True, Fit(solver="average")),
        ((2, 4, 1), "separate", "some", PROGRESSIVE),
        ((3, 3), "shared", "some", Fit(solver="adam", steps=3)),
        ((3, 3), "shared", True, Fit(solver="regmean")),
    ],
)
def test_what_is_kept_is_never_worse_on_the_images_held_out(fitted, classes, labels, share, fit):
    network, made, pools = fitted(classes, labels, share, fit)
    before = tensors(network)
    record = refine(network, made, pools, FAST)
    held = record["held_out"]
    assert held["kept"] <= held["fitted"]
    assert (held["kept"] == held["fitted"]) == (record["kept"] == 0) == equal(before, tensors(network))
    assert record["kept"] > 0, "random networks leave much to refine"
    assert not network.training
    assert [step for step, _ in record["curve"]] == [0, 10, 20, 30]
    assert record["curve"][record["kept"] // 10][1] == held["kept"]
    for task, own in zip(network.tasks, pools, strict=True):
        assert record["images"][task.name] == {"calibration": len(own), "held_out": 10}


def test_the_recorded_loss_is_that_of_the_network_as_it_is_used(fitted):
    network, made, pools = fitted()
    record = refine(network, made, pools, FAST)
    found = []
    for task, own in enumerate(pools):
        apart = take_apart(len(own))
        teacher = Teacher(
            network, made, Alignment(2), [task], watched_values(network.trace, FAST.features), 1.0
        )
        teacher.measure([own[apart.learnt]])
        with torch.no_grad():
            values = values_at(network, network.trace.graph, own[apart.held], teacher.names)
            found.append(teacher.losses(values, teacher(own[apart.held])).mean())
    assert float(sum(found) / 2) == pytest.approx(record["held_out"]["kept"], rel=1e-5)


def test_without_a_clear_gain_the_fitted_network_stays_to_the_last_bit(fitted):
    network, made, pools = fitted()
    before = tensors(network)
    record = refine(network, made, pools, FAST.model_copy(update={"learning_rate": 1e-300}))
    assert record["kept"] == 0
    assert "standard error" in record["why"]
    assert equal(before, tensors(network))


def test_a_gain_must_exceed_its_standard_error():
    clear, noisy, none = torch.tensor([1.0, 1.1, 0.9]), torch.tensor([3.0, -2.0, 0.1]), torch.zeros(3)
    fitted = Look(0, (torch.full((3,), 5.0).double(),) * 2)
    assert Look(1, tuple(own - clear for own in fitted.losses)).beats(fitted)
    assert not Look(1, tuple(own - noisy for own in fitted.losses)).beats(fitted)
    assert not Look(1, tuple(own - none for own in fitted.losses)).beats(fitted)
    assert not Look(1, tuple(own + clear for own in fitted.losses)).beats(fitted)
    assert not Look(1, (torch.zeros(1),)).beats(Look(0, (torch.ones(1),))), "one image has no spread"


def test_a_tenth_is_held_out_and_the_rest_is_learnt():
    for count in (2, 9, 10, 57, 400, 20000):
        apart = take_apart(count)
        assert len(apart.held) == min(512, max(1, count // 10))
        assert torch.equal(torch.cat([apart.learnt, apart.held]).sort().values, torch.arange(count))


def test_patience_ends_a_run_that_brings_nothing(fitted):
    network, made, pools = fitted()
    settings = Refine(steps=500, every=5, patience=2, batch_size=8, learning_rate=1e-300)
    record = refine(network, made, pools, settings)
    assert record["curve"][-1][0] == 10
    assert record["stopped"] == "nothing better in 2 looks"


# -- copies -------------------------------------------------------------------------------------------------------


def test_everything_separate_stays_the_sources(fitted, images):
    network, made, pools = fitted((3, 2), "separate", False)
    before = tensors(network)
    record = refine(network, made, pools, FAST)
    assert record["why"] == "every weight is a copy of a source's"
    assert equal(before, tensors(network))
    network, made, pools = fitted((3, 3), "shared", False, Fit(solver="average"))  # its head is no copy
    features = network.features(images())
    longer = Refine(steps=60, every=20, batch_size=32, learning_rate=0.03)
    record = refine(network, made, pools, longer)
    assert record["kept"] > 0
    assert torch.equal(network.features(images()), features)


def test_copies_stay_copies_while_all_else_is_refined(fitted, images):
    network, made, pools = fitted((3, 3), "shared", "some")
    exact = exact_entries(network)
    node = next(n for n in network.trace.graph.nodes if n.operation == "batch_norm")
    kept = exact[node.name]
    assert kept.any()
    assert not kept.all()

    def value():
        with torch.no_grad():
            return values_at(network, network.trace.graph, images(), [node.name])[node.name]

    before = value()
    assert refine(network, made, pools, FAST.model_copy(update={"steps": 60, "every": 20}))["kept"] > 0
    assert torch.equal(value()[:, kept], before[:, kept])
    assert not torch.equal(value()[:, ~kept], before[:, ~kept])


# -- bytes --------------------------------------------------------------------------------------------------------


def test_twice_the_same_bytes(fitted):
    found = []
    for _ in range(2):
        network, made, pools = fitted((3, 2), "separate", "some")
        settings = FAST.model_copy(update={"shift": 1, "flip": True})
        record = refine(network, made, pools, settings, generator=torch.Generator().manual_seed(5))
        found.append((tensors(network), record))
    assert equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_what_teachers_say_of_many_images_is_asked_again(fitted, monkeypatch):
    found = []
    for most in (2**29, 0):
        network, made, pools = fitted()
        monkeypatch.setattr(held_out, "KEPT_LESSONS", most)
        found.append((refine(network, made, pools, FAST)["curve"], tensors(network)))
    assert found[0][0] == found[1][0]
    assert equal(found[0][1], found[1][1])


def test_labels_of_training_images_are_never_used(fitted, monkeypatch):
    class Profile:
        proxy, tasks = None, {}

    class Params:
        active = Profile

    data = Data(kind="digits", key="x", size=8, channels=1, mean=[0.5], std=[0.5])
    Profile.tasks = {name: type("Task", (), {"data": data}) for name in "ab"}
    uint8 = torch.randint(256, (40, 2, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    found = []
    for seed in (1, 2):
        labels = torch.randint(3, (40,), generator=torch.Generator().manual_seed(seed))
        asked = []

        def load(own, split, root, limit=None, labels=labels, asked=asked):
            asked.append(split)
            images = uint8[:25] if split == "calibration" else uint8[25:]
            return ImageSet(images[:limit], labels, ("0", "1", "2"))

        monkeypatch.setattr(calibration, "load_images", load)
        pools = calibration.load_pools(Params, "all", 1000, torch.device("cpu"))
        network, made, _ = fitted()
        network.float()
        made = [type(s)(s.trace, {k: v.float() for k, v in s.state.items()}, s.task) for s in made]
        record = refine(network, made, pools, FAST)
        found.append(tensors(network))
        assert record["images"]["a"] == {"calibration": 25, "train": 15, "held_out": 4}
        assert set(asked) == {"calibration", "train"}, "never test"
    assert equal(*found)
    for images, most, parts in [(12, 1000, [12]), (12, 9, [9]), ("all", 20, [20]), ("all", 31, [25, 6])]:
        pool = calibration.load_pools(Params, images, most, torch.device("cpu"))[1]
        assert [len(part) for part in pool.parts.values()] == parts


def test_a_pool_is_its_parts_one_behind_the_other():
    data = Data(kind="digits", key="x", size=8, channels=1, mean=[0.2], std=[0.3])
    parts = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 1, 8, 8)
    pool = Pool({"calibration": parts[:12], "train": parts[12:]}, data, torch.device("cpu"))
    chosen = torch.tensor([13, 0, 19, 11, 12, 0])
    assert len(pool) == 20
    torch.testing.assert_close(pool[chosen][:, 0, 0, 0], (chosen / 255 - 0.2) / 0.3)


# -- images that belong to no task --------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "labels"), [((3, 3), "shared"), ((3, 2), "separate")])
def test_a_proxy_is_refined_towards_the_ensemble(classes, labels, small, images, sources):
    made = sources([small(seed, n) for seed, n in enumerate(classes)], images(), labels)
    spec = made[0].trace.spec
    matching, split, x = identity(spec, 2), full_split(spec), images(40)
    fit = Fit(refine=FAST)
    network, _ = fit_network(made, matching, split, [Batch(x, NO_TASK)], fit, labels=labels)
    record = network.about["refined"]
    assert record["kept"] > 0
    assert record["images"] == {"proxy": {"calibration": 40, "held_out": 4}}
    plain, _ = fit_network(made, matching, split, [Batch(x, NO_TASK)], Fit(), labels=labels)
    together = [source(x).softmax(1) for source in made]
    if labels == "shared":
        together = [(sum(source(x) for source in made) / 2).softmax(1)]

    def distance(net):
        with torch.no_grad():
            parts = net(x).split([p.shape[1] for p in together], 1)
        return sum(
            float((p * (p.log() - own.log_softmax(1))).sum()) for p, own in zip(together, parts, strict=True)
        )

    assert distance(network) < distance(plain)


# -- what can go wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_one_line(fitted, count):
    network, made, pools = fitted()
    with pytest.raises(
        InputError, match=f"^refine: found {count} unlabelled images of b; allowed: two"
    ) as error:
        refine(network, made, [pools[0], pools[1][:count]], FAST)
    assert "\n" not in str(error.value)


def test_a_task_without_images_is_one_line(small, images, sources):
    made = sources([small(0), small(1)], images())
    spec = made[0].trace.spec
    with pytest.raises(InputError, match="found 0 unlabelled images of b"):
        fit_network(made, identity(spec, 2), full_split(spec), [Batch(images(20), 0)],
                    Fit(solver="average", refine=FAST), labels="shared")  # fmt: skip


@pytest.mark.parametrize("count", [2, 5])
def test_fewer_images_than_a_batch_are_seen_more_often(fitted, count):
    network, made, pools = fitted(count=count)
    before = tensors(network)
    record = refine(network, made, pools, FAST)
    assert record["kept"] == 0, "one image held out has no spread"
    assert equal(before, tensors(network))


def test_a_loss_that_is_no_number_ends_the_run_with_the_last_good_state(fitted, monkeypatch, caplog):
    network, made, pools = fitted()
    steps = refining._Run._steps

    def broken(run):
        for step, loss in steps(run):
            yield step, math.nan if step == 14 else loss

    monkeypatch.setattr(refining._Run, "_steps", broken)
    record = refine(network, made, pools, FAST)
    assert record["kept"] == 10
    assert record["stopped"] == "the loss is nan at step 14"
    assert [line.getMessage() for line in caplog.records] == [
        "refine: the loss is nan at step 14; the state of step 10 is kept"
    ]


def test_images_that_are_no_numbers_leave_the_fitted_network(fitted):
    network, made, pools = fitted()
    before = tensors(network)
    pools[0][take_apart(len(pools[0])).learnt] = math.nan
    record = refine(network, made, pools, FAST)
    assert record["kept"] == 0
    assert record["stopped"] == "the loss is nan at step 1"
    assert equal(before, tensors(network))


def test_an_interruption_leaves_the_network_as_it_was(fitted, monkeypatch):
    network, made, pools = fitted()
    before = tensors(network)
    steps = refining._Run._steps

    def interrupted(run):
        yield from (found for _, found in zip(range(15), steps(run), strict=False))
        raise KeyboardInterrupt

    monkeypatch.setattr(refining._Run, "_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refine(network, made, pools, FAST)
    assert equal(before, tensors(network))
    assert not network.training


def test_what_will_not_fit_in_memory_is_refused_before_it_starts(fitted, monkeypatch):
    network, made, pools = fitted()
    monkeypatch.setattr(refining._Run, "_steps", lambda run: pytest.fail("it started"))
    with pytest.raises(InputError, match=r"^refine: needs .* GiB, there are .* GiB; allowed: "):
        refine(network, made, pools, FAST, memory=1e-6)


def test_images_that_are_none_are_not_moved(small, sources):
    made = sources([torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double()
                    for _ in range(2)], torch.randn(4, 4).double())  # fmt: skip
    spec = made[0].trace.spec
    batches = [Batch(torch.randn(200, 4).double(), task) for task in range(2)]
    fit = Fit(solver="average", refine=FAST)
    network, _ = fit_network(made, identity(spec, 2), full_split(spec), batches, fit, labels="shared")
    assert network.about["refined"]["kept"] > 0
    with pytest.raises(InputError, match="shift and flip: found 1 and False for inputs of 2 dimensions"):
        fit_network(made, identity(spec, 2), full_split(spec), batches, fit, labels="shared", shift=1)
