"""The notebook face: what is given in another form is read where its meaning is clear, and told of where it is not."""

import gc
import itertools
import math
import os
import random
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_api import Plain, batches, networks
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stages import inspect, load_merged, merge
from stages.core.runtime.errors import LONGEST, InputError


def weights(merged):
    return merged.state_dict()


def alike(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def plain():
    return weights(merge(networks(), batches(), 1.3, progress=False))


class Items(Dataset):
    def __init__(self, images, pack=lambda x: x):
        self.images, self.pack = images, pack

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.pack(self.images[index])


FORMS = {
    "tuples": lambda own: [(x, torch.zeros(len(x))) for x in own],
    "dicts": lambda own: [{"pixel_values": x, "labels": torch.zeros(len(x))} for x in own],
    "a generator": iter,
    "doubles": lambda own: [x.double() for x in own],
    "a loader": lambda own: DataLoader(TensorDataset(torch.cat(own), torch.zeros(16)), 8),
    "frozen by inference mode": lambda own: [frozen(x) for x in own],
}
TOGETHER = {  # the same images in one batch
    "a bare tensor": torch.cat,
    "a tuple of images and labels": lambda own: (torch.cat(own), torch.zeros(16).long()),
    "a dataset": lambda own: Items(torch.cat(own)),
    "a labelled dataset": lambda own: Items(torch.cat(own), lambda x: (x, 3)),
    "a dataset of dicts": lambda own: Items(torch.cat(own), lambda x: {"image": x, "label": 3}),
    "a list of images": lambda own: list(torch.cat(own)),
    "a loader of images": lambda own: DataLoader(torch.cat(own), batch_size=None),
}


def frozen(x):
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("form", [*FORMS, *TOGETHER])
def test_images_in_any_clear_form_give_the_same_network(form, plain):
    own = batches()
    if form in FORMS:
        expected = plain
    else:
        expected = weights(
            merge(networks(), {k: [torch.cat(v)] for k, v in own.items()}, 1.3, progress=False)
        )
    given = {name: {**FORMS, **TOGETHER}[form](x) for name, x in own.items()}
    assert alike(weights(merge(networks(), given, 1.3, progress=False)), expected)


def test_an_endless_generator_is_read_as_far_as_is_asked():
    own = batches()
    endless = {name: itertools.cycle(x) for name, x in own.items()}
    found = merge(networks(), endless, 1.3, options={"images": 12}, progress=False)
    first = {name: [x[0], x[1][:4]] for name, x in own.items()}
    assert alike(weights(found), weights(merge(networks(), first, 1.3, progress=False)))


def test_an_endless_generator_is_refused_by_count(monkeypatch):
    monkeypatch.setattr("stages.loaders.MOST_IMAGES", 1000)
    endless = {name: itertools.cycle(x) for name, x in batches().items()}
    refused({"batches": endless}, "task a: found 1008 images.* no end; allowed: up to 1000 .*.images.: 1000")


AROUND = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "a default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("what", AROUND)
def test_what_is_set_around_the_call_changes_nothing(what, plain):
    given, own = networks(), batches()
    with AROUND[what]():
        found = weights(merge(given, own, 1.3, progress=False))
    assert alike(found, plain)
    assert not any(tensor.is_inference() for tensor in found.values())


def test_the_default_type_changes_nothing(plain):
    given, own = networks(), batches()
    torch.set_default_dtype(torch.float64)
    try:
        found = weights(merge(given, own, 1.3, progress=False))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert alike(found, plain)


class Noisy(Plain):
    """Draws numbers while it runs."""

    def forward(self, x):
        torch.rand(3)
        random.random()
        np.random.rand()
        return super().forward(x)


FLAGS = (
    torch.are_deterministic_algorithms_enabled, torch.is_inference_mode_enabled, torch.is_grad_enabled,
    torch.is_autocast_enabled, torch.get_default_dtype, torch.backends.mha.get_fastpath_enabled, torch.get_num_threads,
)  # fmt: skip


def states():
    drawn = np.random.get_state()[1].tolist()
    return torch.get_rng_state().tolist(), random.getstate(), drawn, [flag() for flag in FLAGS]


def test_random_states_and_flags_are_left_as_found():
    given, own = {name: Noisy() for name in "ab"}, batches()
    before = states()
    merge(given, own, progress=False)
    assert states() == before
    with pytest.raises(InputError):
        merge(given, {"a": [torch.zeros(8, 3, 6, 6)], "b": []}, progress=False)
    assert states() == before


def refused(change, message):
    arguments = {"networks": networks(), "batches": batches(), "progress": False} | change
    with pytest.raises(InputError, match=message) as error:
        merge(**arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= LONGEST


def changed(name, value, given=None):
    """Networks of which the second has another tensor, or other tensors."""
    found = given or networks()
    with torch.no_grad():
        found["b"].get_buffer(name).copy_(value) if "running" in name else found["b"].get_parameter(
            name
        ).copy_(value)
    return found


def of(network):
    return {"a": networks()["a"], "b": network}


class Lazy(Plain):
    def __init__(self):
        super().__init__()
        self.values = nn.LazyLinear(3)


def forward(body, **more):
    """A network with a forward of its own."""
    return type("Odd", (Plain,), {"forward": lambda self, x: body(self, x), **more})


run = Plain.forward
squeezed = forward(lambda self, x: run(self, x).squeeze())
HALF = {"a": networks()["a"].half(), "b": networks()["b"]}

NETWORKS = {
    "a list": (lambda: list(networks().values()), "networks: found list; allowed: a mapping"),
    "None": (lambda: None, "networks: found None; allowed"),
    "text": (lambda: "ab", "networks: found str"),
    "one": (lambda: {"a": Plain()}, "networks: found 1; allowed: two"),
    "a state dict": (lambda: of(Plain().state_dict()), "task b: found OrderedDict; allowed: a torch.nn.Module, with"),
    "nothing": (lambda: of(None), "task b: found None; allowed: a torch.nn.Module"),
    "numbers as names": (lambda: {0: Plain(), 1: Plain()}, "a task named 0; allowed: a text"),
    "lazy layers": (lambda: of(Lazy()), "task b: values.weight is lazy"),
    "no numbers": (lambda: of(Plain().to("meta")), "task b: first.weight is on the meta device"),
    "two types between them": (lambda: of(Plain().double()), "a of torch.float32, b of torch.float64; allowed: one"),
    "two types within one": (lambda: of(mixed()), "task b: parameters of torch.float32, torch.float64"),
    "NaN": (lambda: changed("second.weight", math.nan), "task b: second.weight holds NaN"),
    "infinity": (lambda: changed("second.weight", math.inf), "task b: second.weight holds NaN or inf"),
    "a negative variance": (lambda: changed("norm.running_var", -1.0), "running_var holds a negative variance"),
    "huge weights": (lambda: changed("values.weight", 3e38), "task b: .* returns NaN or infinity"),
    "a tuple": (lambda: of(forward(lambda s, x: (run(s, x), run(s, -x)))()), "returns a tuple of 0, 1; allow"),
    "a dict": (lambda: of(forward(lambda s, x: {"y": run(s, x), "x": run(s, -x)})()), "a dict of y, x; allow"),
    "no logits": (lambda: of(forward(lambda s, x: run(s, x)[:, :0])()), r"returns \(2, 0\) for 2 images"),
    "no classes": (lambda: of(forward(lambda s, x: run(s, x).sum(1))()), r"returns \(2,\) for 2 images"),
    "an error of its own": (lambda: of(forward(lambda s, x: 1 / 0)()), "Error: division by zero, at test_given"),
    "a strange class": (lambda: of(forward(lambda s, x: s.missing)()), "AttributeError: .*missing"),
}  # fmt: skip


def mixed():
    network = Plain()
    network.values.double()
    return network


@pytest.mark.parametrize("what", NETWORKS)
def test_what_is_no_network_is_told_of(what):
    make, message = NETWORKS[what]
    refused({"networks": make()}, message)


def images(own):
    return {"batches": {"a": own, "b": batches()["b"]}}


def failing():
    yield torch.zeros(8, 1, 6, 6)
    raise OSError("no such disk")


BATCHES = {
    "a list": ({"batches": list(batches().values())}, "batches: found list; allowed: a mapping"),
    "None": ({"batches": None}, "batches: found None"),
    "text": (images("abc"), "batches: task a: found str; allowed: tensors"),
    "nothing": (images(None), "batches: task a: found None; allowed: tensors"),
    "lists of numbers": (images([[1.0, 2.0]]), "batches: task a: found float; allowed: tensors"),
    "arrays": (images([np.zeros((8, 1, 6, 6))]), "batches: task a: found ndarray"),
    "labels first": (images([(torch.zeros(8).long(), torch.zeros(8, 1, 6, 6))]), "labels before images"),
    "three dimensions": (
        images([torch.zeros(8, 6, 6)]),
        "task a: Plain on images of n x 6 x 6, torch.float32, fails",
    ),
    "three channels": (images([torch.zeros(8, 3, 6, 6)]), "task a: Plain on images of n x 3 x 6 x 6"),
    "bool": (images([torch.zeros(8, 1, 6, 6).bool()]), "task a: found torch.bool"),
    "complex": (images([torch.zeros(8, 1, 6, 6) + 0j]), "task a: found torch.complex64"),
    "bytes": (
        images([torch.zeros(8, 1, 6, 6).byte()]),
        "task a: Plain on images of n x 1 x 6 x 6, torch.uint8, fails",
    ),
    "NaN": (images([torch.full((8, 1, 6, 6), math.nan)]), "found NaN or infinite images|returns NaN"),
    "infinity": (images([torch.full((8, 1, 6, 6), math.inf)]), "found NaN or infinite images|returns NaN"),
    "huge": (images([torch.full((8, 1, 6, 6), 3e38)]), "returns NaN or infinity"),
    "huge squares": (
        images([torch.full((8, 1, 6, 6), 1e30)]),
        "group first: features whose squares are not finite",
    ),
    "no numbers": (images([torch.zeros(8, 1, 6, 6, device="meta")]), "meta, sparse or nested"),
    "sparse": (images([torch.zeros(8, 1, 6, 6).to_sparse()]), "meta, sparse or nested"),
    "a strange dict": (images([{"a": torch.zeros(8, 1, 6, 6)}]), "found a dict of a; allowed: one of image"),
    "a loader that fails": (
        images(failing()),
        "reading its images fails .OSError: no such disk, at test_given.py",
    ),
    "no images": (images([torch.zeros(0, 1, 6, 6)]), "task a has none or an empty one"),
    "a network": (images(Plain()), "task a: found Plain"),
}


@pytest.mark.parametrize("what", BATCHES)
def test_what_are_no_images_is_told_of(what):
    refused(*BATCHES[what])


def test_several_images_in_one_entry_are_not_taken_as_the_first_alone():
    """A list that nobody stacked is refused; a second view, or a label, beside an image or a batch is not."""
    own = list(torch.randn(8, 1, 6, 6))
    for entry in (own, own[:2], [torch.zeros(1, 6, 6), torch.zeros(1, 7, 7)], tuple(own)):
        refused(
            images([entry]),
            f"task a: found {len(entry)} images in a (list|tuple); allowed: one tensor of them",
        )
    refused(images([own[0], own[1:]]), "task a: found 7 images in a list")
    for views in (
        [(torch.stack(own), torch.stack(own))],
        Items(own, lambda x: (x, x)),
        [(own[0], torch.tensor(3))],
    ):
        merge(networks(), images(views)["batches"], progress=False)


def test_images_that_torch_negates_when_they_are_read_are_taken():
    own = torch.fft.fft2(torch.randn(8, 1, 6, 6)).conj().imag
    assert own.is_neg()
    found = merge(networks(), images([own])["batches"], progress=False)
    assert alike(
        weights(found), weights(merge(networks(), images([own.resolve_neg()])["batches"], progress=False))
    )


def test_networks_that_inference_mode_made_are_taken():
    with torch.inference_mode():
        given = networks()
    assert alike(
        weights(merge(given, batches(), 1.3, progress=False)),
        weights(merge(networks(), batches(), 1.3, progress=False)),
    )


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_numbers_of_numpy_are_numbers(kind):
    found = merge(networks(), batches(), kind(1.5), options={"seed": np.int64(1)}, progress=False)
    plain_numbers = merge(networks(), batches(), 1.5, options={"seed": 1}, progress=False)
    assert alike(weights(found), weights(plain_numbers))
    refused({"budget": kind("nan")}, "budget: found nan")
    refused({"options": {"seed": np.float64(0.5)}}, "options.seed: found 0.5")


@pytest.mark.parametrize(
    "number",
    [Fraction(3, 2), Decimal("1.5"), np.array(1.5), torch.tensor(1.5), torch.tensor(1.5, requires_grad=True)],
)
def test_numbers_of_one_meaning_are_numbers(number):
    found = merge(networks(), batches(), number, options={"memory": number}, progress=False)
    plain_numbers = merge(networks(), batches(), 1.5, options={"memory": 1.5}, progress=False)
    assert alike(weights(found), weights(plain_numbers))
    assert found.about["budget"]["asked"] == 1.5


class Unwritten:
    def __repr__(self):
        raise RuntimeError("nothing to show")


NO_NUMBERS = {
    "a signalling NaN": Decimal("sNaN"),
    "more than a float holds": Fraction(10**400),
    "a tensor of several": torch.ones(3),
    "an array of several": np.ones(3),
    "a complex one": torch.tensor(1j),
    "one without a value": torch.tensor(1.0, device="meta"),
    "thousands of digits": 10**5000,
    "without a text": Unwritten(),
}


@pytest.mark.parametrize("name", ["budget", "method", "labels", "progress", "options", "classes"])
@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_values_of_no_plain_meaning_are_one_line(name, value):
    refused({name: value}, f"^{name}: found ")


@pytest.mark.parametrize("storage", ["auto", "memory", "disk"])
def test_a_memory_limit_far_too_small_is_told_what_is_needed(storage):
    with pytest.raises(InputError, match="or a memory limit of about ") as error:
        merge(networks(), batches(), options={"memory": 1e-9, "storage": storage}, progress=False)
    least = float(str(error.value).rpartition(" ")[2])
    assert 1e-6 < least < 1e-2
    merge(networks(), batches(), options={"memory": 20 * least, "storage": storage}, progress=False)
    merge(networks(), batches(), options={"memory": 1e300, "storage": storage}, progress=False)


def test_what_is_kept_on_disk_is_closed(monkeypatch):
    said = []
    monkeypatch.setattr("sys.unraisablehook", lambda fault: said.append(fault.exc_value))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        merge(networks(), batches(), options={"storage": "disk"}, progress=False)
        refused({"options": {"storage": "disk", "memory": 1e-4}}, "^fit, values on disk: needs")
        gc.collect()
    assert not said


def option(name, value):
    return {"options": {name: value}}


OTHERS = {
    "ridge below zero": (option("ridge", -1.0), "options.ridge: found -1"),
    "ridge of NaN": (option("ridge", math.nan), "options.ridge: found nan"),
    "an endless ridge": (option("ridge", math.inf), "options.ridge: found inf"),
    "ridge true": (option("ridge", True), "options.ridge: found True"),
    "seed of text": (option("seed", "1"), "options.seed: found '1'"),
    "half a seed": (option("seed", 0.5), "options.seed: found 0.5"),
    "images of zero": (option("images", 0), "options.images: found 0"),
    "an option that is none": (option("colour", 1), "options.colour: unknown key"),
    "options as a list": ({"options": []}, "options: found .*; allowed: a mapping"),
    "fit as text": ({"method": {"fit": "exact"}}, "fit: found 'exact'"),
    "fit as None": ({"method": {"fit": None}}, "fit: found None"),
    "match as None": ({"method": {"match": None}}, "match: found None"),
    "match as a list": ({"method": {"match": ["weights"]}}, "match: found .'weights'."),
    "allocate as None": (option("allocate", None), "options.allocate: found None"),
    "allocate as text": (option("allocate", "measured"), "options.allocate: found 'measured'"),
    "match by proxy": ({"method": {"match": {"by": "activations", "data": "proxy"}}}, "found data: proxy"),
    "a rate that cannot be meant": (
        {"method": {"fit": {"solver": "adam", "learning_rate": 1e30}}}, "fit: adam gives no numbers"),
    "classes of another task": ({"classes": {"c": ["x", "y", "z"]}}, "classes: found task c; allowed: a, b"),
    "classes twice": ({"classes": {"a": ["x", "x", "y"]}}, "task a: found x, x, y; allowed: 3 different names"),
    "classes as one text": ({"classes": {"a": "xyz"}}, "task a: found 'xyz'; allowed: 3 different"),
    "classes by number": ({"classes": {"a": [0, 1, 2]}}, "task a: found .0, 1, 2.; allowed: 3 different"),
    "too few classes": ({"classes": {"a": ["x", "y"]}}, "task a: found x, y; allowed: 3"),
    "a method that is none": ({"method": "progressiv"}, "'progressiv'; allowed: progressive, .* and 4. more"),
    "a long name of a method": ({"method": "é" * 400}, "allowed: .* more, or a mapping"),
    "a matching that is none": ({"method": {"match": "zipp"}}, "match: found 'zipp'; allowed: zipit, .* more, or"),
    "progress as text": ({"progress": "no"}, "progress: found 'no'; allowed: True, False"),
    "progress as an array": ({"progress": np.zeros(2)}, "progress: found array"),
    "classes as a list": ({"classes": ["x", "y", "z"]}, "classes: found list"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_settings_that_cannot_be_meant_are_refused(what):
    refused(*OTHERS[what])


def test_a_network_that_squeezes_is_merged_though_a_batch_may_hold_one_image():
    given = {name: squeezed() for name in "ab"}
    own = {name: [torch.randn(1, 1, 6, 6), torch.randn(8, 1, 6, 6)] for name in "ab"}
    assert merge(given, own, progress=False)(torch.randn(1, 1, 6, 6)).shape[-1] == 3


def sized():
    body = (nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).eval()


def test_images_of_several_sizes_are_taken_where_every_network_takes_them():
    own = {"a": [torch.randn(8, 1, 6, 6)], "b": [torch.randn(8, 1, 8, 8)]}
    assert merge(networks(), own, progress=False)(torch.randn(2, 1, 7, 7)).shape == (2, 3)

    deep = {n: sized() for n in "ab"}  # whose layers are fitted from maps where all are of one size
    mixed = {"a": [torch.randn(8, 3, 6, 6), torch.randn(8, 3, 8, 6)], "b": [torch.randn(8, 3, 4, 4)]}
    for method in ("pleas", "regmean", "featcal"):
        assert merge(deep, mixed, method=method, progress=False)(torch.randn(2, 3, 7, 7)).shape == (2, 3)
    whole = {"networks": deep, "batches": mixed}
    for changed, message in [
        ({"method": "pleas_adam"}, "fit: found solver adam with images of several sizes"),
        ({"method": "fs_merge"}, "fit: found solver fs_merge with images of several sizes"),
        ({"method": "progressive_refined"}, "fit: found refine with images of several sizes"),
        ({"options": {"positions": 0.5}}, "fit: found positions 0.5 with images of several sizes"),
        (
            {"method": "pleas_adam", "options": {"storage": "disk"}},
            "solver adam with images of several sizes",
        ),
    ]:
        refused({**whole, **changed}, message)

    class Flat(Plain):
        def __init__(self):
            super().__init__()
            self.values = nn.Linear(6 * 36, 3)

        def forward(self, x):
            return self.values(torch.relu(self.norm(self.first(x))).flatten(1))

    refused(
        {"networks": {n: Flat() for n in "ab"}, "batches": own}, "task b: Flat on images of n x 1 x 8 x 8"
    )


def test_merged_networks_are_merged_again_in_their_plain_form():
    pairs = [{name: Plain() for name in "ab"} for _ in range(2)]
    merged = [merge(pair, batches(), progress=False) for pair in pairs]
    both = dict(zip("ab", merged, strict=True))
    again = merge(both, batches(), budget=2.0, labels="separate", progress=False)
    x = torch.cat(batches()["b"])
    for name, own in both.items():
        torch.testing.assert_close(again(x, task=name), own(x), atol=1e-2, rtol=1e-2)


def test_images_of_bytes_are_warned_of_once_a_task(caplog):
    own = {name: [torch.randint(0, 256, (8, 1, 6, 6)).float() for _ in range(3)] for name in "ab"}
    merge(networks(), own, progress=False)
    said = [line for line in caplog.messages if "are they scaled as in training?" in line]
    assert [line[:7] for line in said] == ["task a:", "task b:"]


def test_a_network_that_tells_no_image_from_another_is_warned_of(caplog):
    found = networks()
    with torch.no_grad():
        found["b"].values.weight.zero_()
    merge(found, batches(), progress=False)
    assert [line for line in caplog.messages if "the same logits" in line] == [
        "task b: Plain gives different images the same logits: are its weights loaded, its images scaled?"
    ]


def test_an_inspection_tells_of_the_same(plain):
    for network, example, message in [
        (None, torch.zeros(2, 1, 6, 6), "network: found None"),
        (Lazy(), torch.zeros(2, 1, 6, 6), "network: values.weight is lazy"),
        (Plain(), torch.zeros(2, 3, 6, 6), "example: Plain on images of n x 3 x 6 x 6"),
        (Plain(), None, "example: found None"),
    ]:
        with pytest.raises(InputError, match=message):
            inspect(network, example)


class Pixels(nn.Module):
    """Takes pixels from 0 to 255 and scales them itself."""

    def __init__(self, scaled=lambda x: x.float() / 255):
        super().__init__()
        self.scaled, self.conv, self.fc = scaled, nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv(self.scaled(x)).relu().mean((2, 3)))


def pixels(scaled=None):
    torch.manual_seed(0)
    made = {name: Pixels(scaled) if scaled else Pixels() for name in "ab"}
    return made, {name: torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8) for name in made}


def test_images_of_whole_numbers_are_the_floats_that_the_networks_make_of_them(tmp_path):
    made, images = pixels()
    found = merge(made, images, 1.3, progress=False)
    floats = merge(made, {name: x.float() for name, x in images.items()}, 1.3, progress=False)
    assert alike(weights(found), weights(floats))
    found.save(tmp_path / "merged")
    with torch.no_grad():
        for own in (found, load_merged(tmp_path / "merged"), found.plain()):
            for x in (images["a"], images["a"].long(), images["a"].float()):
                torch.testing.assert_close(own(x), floats(images["a"].float()))
    with pytest.raises(InputError, match=r"found torch\.uint8; allowed: floats"):
        floats(images["a"])
    both = merge(made, {"a": images["a"], "b": images["b"].float()}, 1.3, progress=False)
    assert alike(weights(found), weights(both))


def test_images_with_which_a_network_reckons_otherwise_than_with_floats_are_refused():
    made, images = pixels(lambda x: (x - 128).float())  # wraps around in bytes
    with pytest.raises(
        InputError, match=r"task a: found torch\.uint8, with which .* allowed: images.float\(\)"
    ):
        merge(made, images, progress=False)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda merged, folder: load_merged(None), "path: found None; allowed: a text or a Path"),
        (lambda merged, folder: merged.save(3), "path: found 3; allowed: a text or a Path"),
        (lambda merged, folder: merged.save(folder), "cannot be written"),
        (lambda merged, folder: merged(None), "input: found NoneType; allowed: a tensor"),
        (lambda merged, folder: merged(np.zeros((2, 1, 6, 6))), "input: found ndarray; allowed: a tensor"),
        (lambda merged, folder: merged.tune("images"), "example: found str; allowed: a tensor of images"),
        (
            lambda merged, folder: merged.tune(torch.zeros(2, 1, 6, 6).double()),
            "input: found torch.float64; allowed",
        ),
        (
            lambda merged, folder: merged.tune(torch.zeros(2, 1, 6, 6, device="meta")),
            "input: found it on meta; allowed: c",
        ),
        (
            lambda merged, folder: merged(torch.zeros(2, 1, 6, 6, device="meta")),
            "input: found it on meta; allowed: cpu",
        ),
        (
            lambda merged, folder: merged(torch.zeros(2, 1, 6, 6).to_sparse()),
            "layout torch.sparse_coo; allowed: an",
        ),
        (
            lambda merged, folder: cast(merged, torch.zeros(2, 1, 6, 6).double()),
            "input: found torch.float64; allowed",
        ),
        (
            lambda merged, folder: inspect(Plain(), torch.zeros(2, 1, 6, 6, device="meta")),
            "example: found .* meta",
        ),
        (
            lambda merged, folder: inspect(Plain(), torch.tensor(1.0)),
            "example: found Tensor; allowed: a tensor of",
        ),
        (
            lambda merged, folder: merged.to("meta").save(folder / "x"),
            "found a tensor on the meta device; allowed: one",
        ),
        (lambda merged, folder: merged.save(""), "cannot be written .Is a directory"),
        (lambda merged, folder: merged.save("a\0b"), "allowed: a text or a Path"),
        (lambda merged, folder: merged.save("~nobody-of-this-name/x"), "allowed: the whole path"),
        (lambda merged, folder: load_merged("x" * 5000), "cannot be read .File name too long"),
        (lambda merged, folder: load_merged("a\0b"), "allowed: a text or a Path"),
        (
            lambda merged, folder: load_merged("x", "cuda:99"),
            "device: found 'cuda:99'; allowed: cpu, or a GPU",
        ),
        (lambda merged, folder: load_merged("x", "tpu9"), "device: found 'tpu9'; allowed: cpu, or a GPU"),
    ],
)
def test_a_merged_network_is_told_what_it_cannot_take(call, line, tmp_path):
    merged = merge(networks(), batches(), 1.3, progress=False)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=line) as error:
        call(merged, tmp_path)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def cast(merged, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return merged(x)


def test_a_merged_network_is_saved_in_the_own_folder_and_onto_no_pipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    merged = merge(networks(), batches(), 1.3, progress=False)
    merged.save("~/merged.safetensors")
    assert (tmp_path / "merged.safetensors").is_file()
    assert alike(weights(load_merged("~/merged.safetensors")), weights(merged))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: cannot be written .no ordinary file"):
        merged.save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_network_is_refused():
    packed = {name: torch.ao.quantization.quantize_dynamic(own) for name, own in networks().items()}
    with pytest.raises(
        InputError, match=r"task a: .* is no tensor; allowed: a network before it was quantised"
    ):
        merge(packed, batches(), progress=False)
