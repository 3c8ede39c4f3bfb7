import io
import resource
import struct
import subprocess
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.artifacts.embedded import write_digits
from stages.core.images.batches import Batches, normalise
from stages.core.images.decoding import THIN, VIEWS, Decoder, _fit
from stages.core.images.load import load_images
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import write_tensors
from stages.core.settings.profiles import Data

SPLITS = ("train", "calibration", "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_digits(folder / "digits.safetensors", 16)
    return folder


def digits(**changes):
    return Data(kind="digits", key="digits.safetensors", size=16, channels=1, **changes)


def folder(**changes):
    return Data(**{"kind": "folder", "key": "images.zip", "size": 8, **changes})


def png(value, size=(8, 8), mode="L"):
    content = io.BytesIO()
    Image.new(mode, size, value).save(content, "PNG")
    return content.getvalue()


def members(top="", train=8, test=3, classes=("cat", "dog")):
    """Images of one grey each, the grey telling which image it is."""
    found = {}
    for c, name in enumerate(classes):
        for i in range(train):
            found[f"{top}train/{name}/{i:02}.png"] = png(100 * c + i)
        for i in range(test):
            found[f"{top}test/{name}/{i:02}.png"] = png(100 * c + 50 + i)
    return found


def zipped(path, entries):
    with zipfile.ZipFile(path / "images.zip", "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return path


def rows(images):
    return [bytes(image.flatten().tolist()) for image in images]


# --- digits


@pytest.mark.parametrize("view", list(VIEWS))
def test_digits_splits_are_disjoint_cover_and_agree_between_views(root, view):
    found = {split: load_images(digits(view=view), split, root) for split in SPLITS}
    assert [len(found[split]) for split in SPLITS] == [897, 400, 500]
    for split in SPLITS:
        upright = load_images(digits(), split, root)
        assert torch.equal(found[split].images, VIEWS[view](upright.images))
    every = [row for split in SPLITS for row in rows(found[split].images)]
    assert len(set(every)) == len(every) == 1797


def test_calibration_images_have_no_labels_and_the_others_do(root):
    assert load_images(digits(), "calibration", root).labels is None
    for split in ("train", "test"):
        labels = load_images(digits(), split, root).labels
        assert labels.dtype == torch.int64
        assert set(labels.tolist()) == set(range(10))


def test_a_class_subset_is_the_whole_split_filtered_and_labelled_in_the_order_given(root):
    whole = load_images(digits(), "test", root)
    part = load_images(digits(classes=["7", "2"]), "test", root)
    kept = (whole.labels == 7) | (whole.labels == 2)
    assert part.classes == ("7", "2")
    assert torch.equal(part.images, whole.images[kept])
    assert torch.equal(part.labels, (whole.labels[kept] == 2).long())


def test_digits_can_be_asked_for_in_three_channels(root):
    grey = load_images(digits(), "test", root, limit=5).images
    data = Data(kind="digits", key="digits.safetensors", size=16, channels=3)
    assert torch.equal(load_images(data, "test", root, limit=5).images, grey.expand(-1, 3, -1, -1))


def test_the_nearest_mean_recognises_the_digits(root):
    """The labels belong to the images."""
    train, test = (load_images(digits(), split, root) for split in ("train", "test"))
    means = torch.stack([train.images[train.labels == c].float().mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(test.images.float().flatten(1), means).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.85


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (digits(classes=["1", "eleven"]), "found 'eleven'; allowed: 0, 1"),
        (Data(kind="digits", key="nothing.safetensors", size=16), "no such file"),
        (Data(kind="digits", key="digits.safetensors", size=20), "(1797, 20, 20)"),
        (Data(kind="digits", key="other.safetensors", size=16), "found {'x'"),
        (Data(kind="digits", key="text.safetensors", size=16), "not a whole safetensors file"),
    ],
)
def test_digits_that_cannot_be_read_are_one_line(root, data, message):
    write_tensors(root / "other.safetensors", {"x": torch.ones(2)})
    (root / "text.safetensors").write_text("no tensors")
    with pytest.raises(InputError) as caught:
        load_images(data, "train", root)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- views and batches


@given(
    st.integers(1, 3),
    st.sampled_from([1, 3]),
    st.integers(1, 9),
    st.sampled_from(sorted(VIEWS.keys() - {"edges"})),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_view_but_edges_is_a_bijection(n, channels, size, view, seed):
    images = torch.randint(
        256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    inverse = {
        "upright": lambda x: x,
        "rotated": lambda x: torch.rot90(x, -1, (2, 3)),
        "inverted": lambda x: 255 - x,
        "mirrored": lambda x: torch.rot90(x.flip(3), 1, (2, 3)),
    }[view]
    assert torch.equal(inverse(VIEWS[view](images)), images)


def test_the_views_of_one_image():
    image = torch.tensor([[[[0, 1], [2, 3]]]], dtype=torch.uint8)
    found = {name: view(image).flatten().tolist() for name, view in VIEWS.items()}
    assert found == {
        "upright": [0, 1, 2, 3],
        "rotated": [1, 3, 0, 2],
        "inverted": [255, 254, 253, 252],
        "mirrored": [0, 2, 1, 3],
        "edges": [4, 4, 4, 4],
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_edges_are_the_outlines_of_areas(channels):
    images = torch.full((1, channels, 8, 8), 40, dtype=torch.uint8)
    images[..., 4:] = 140
    found = VIEWS["edges"](images)
    assert found.dtype == torch.uint8
    assert found.shape == images.shape
    assert torch.equal(found[..., 3:5], torch.full((1, channels, 8, 2), 200, dtype=torch.uint8))
    assert not found[..., :3].any()
    assert not found[..., 5:].any()
    assert torch.equal(VIEWS["edges"](255 - images), found)
    assert torch.equal(VIEWS["edges"](images.mT), found.mT)


def test_normalise_by_channel():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    found = normalise(images, [0.5, 0.25], [0.5, 0.75])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, :, 1, 1], torch.tensor([-1.0, 1.0]))


def test_batches_are_the_normalised_images_in_order(root):
    data = digits(mean=[0.1], std=[0.3])
    images = load_images(data, "test", root).images
    found = list(Batches(images, 128, data, torch.device("cpu")))
    assert [len(batch) for batch in found] == [128, 128, 128, 116]
    assert torch.equal(torch.cat(found), normalise(images, data.mean, data.std))


# --- folder


@pytest.mark.parametrize("top", ["", "pets/"])
def test_a_zip_folder_is_split_without_overlap(tmp_path, top):
    entries = {"README.txt": b"hello", "__MACOSX/train/cat/._1.png": b"", **members(top)}
    zipped(tmp_path, entries)
    found = {split: load_images(folder(), split, tmp_path) for split in SPLITS}
    greys = {split: found[split].images[:, 0, 0, 0].tolist() for split in SPLITS}
    assert sorted(greys["train"] + greys["calibration"]) == [*range(8), *range(100, 108)]
    assert sum(grey >= 100 for grey in greys["calibration"]) == 2  # a quarter of each class
    assert len(greys["calibration"]) == 4
    assert sorted(greys["test"]) == [50, 51, 52, 150, 151, 152]
    assert found["calibration"].labels is None
    assert found["test"].labels.tolist() == [int(grey >= 100) for grey in greys["test"]]
    assert found["train"].classes == ("cat", "dog")


def test_the_first_images_are_a_mixture_of_classes_and_limit_takes_them(tmp_path):
    zipped(tmp_path, members(train=40))
    whole = load_images(folder(), "train", tmp_path)
    first = load_images(folder(), "train", tmp_path, limit=20)
    assert torch.equal(first.images, whole.images[:20])
    assert 4 < first.labels.sum() < 16


def test_a_class_subset_of_a_folder_keeps_the_split(tmp_path):
    zipped(tmp_path, members(classes=("ant", "bee", "cow")))
    part = {split: load_images(folder(classes=["cow", "ant"]), split, tmp_path) for split in SPLITS}
    for split in SPLITS:
        whole = load_images(folder(), split, tmp_path)
        kept = [row for row in rows(whole.images) if not 100 <= row[0] < 200]
        assert sorted(rows(part[split].images)) == sorted(kept)
    first = part["test"].images[:, 0, 0, 0] >= 200
    assert torch.equal(part["test"].labels, (~first).long())


def test_images_are_scaled_by_the_shorter_side_and_cropped_in_the_centre(tmp_path):
    wide = Image.new("RGB", (48, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (16, 0, 32, 16))  # the middle third is blue
    content = io.BytesIO()
    wide.save(content, "PNG")
    entries = members()
    entries["test/cat/00.png"] = content.getvalue()
    zipped(tmp_path, entries)
    images = load_images(folder(size=8), "test", tmp_path).images
    blue = images[images[:, 2].float().mean((1, 2)) > 200]
    assert blue.shape == (1, 3, 8, 8)
    assert blue[0, 2].min() > 100


def test_colour_and_grey_images_are_brought_to_the_channels_asked_for(tmp_path):
    entries = members()
    entries["test/cat/00.png"] = png((10, 200, 30), mode="RGB")
    entries["test/cat/01.png"] = png((10, 200, 30, 128), mode="RGBA")
    zipped(tmp_path, entries)
    assert load_images(folder(channels=1), "test", tmp_path).images.shape == (6, 1, 8, 8)
    colours = load_images(folder(channels=3), "test", tmp_path).images[:, :, 0, 0].tolist()
    assert colours.count([10, 200, 30]) == 2


def one_class():
    return {name: content for name, content in members().items() if "cat" in name}


def without(part):
    return {name: content for name, content in members().items() if part not in name}


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ({}, {}, "nothing in it"),
        ({"notes.txt": b""}, {}, "no images in train/ or test/"),
        (without("train/"), {}, "no images in train/;"),
        (without("test/"), {}, "no images in test/;"),
        (without("test/dog"), {}, "only in train ['dog']"),
        (one_class(), {}, "one class 'cat'"),
        ({**members(), "train/../../x.png": b""}, {}, "leaves the folder"),
        ({**members(), "/train/cat/x.png": b""}, {}, "leaves the folder"),
        ({**members(), "train/x.png": b""}, {}, "in no class folder"),
        ({**members("a/"), **members("b/")}, {}, "several top folders"),
        ({**members(), "train/dog/99.png": b"nothing"}, {}, "train/dog/99.png: not a readable image"),
        ({**members(), "train/dog/99.png": png(1)[:-30]}, {}, "train/dog/99.png: not a readable image"),
        (members(), {"classes": ["cat", "fish"]}, "found 'fish'; allowed: cat, dog"),
        (members(), {"calibration": 1.0}, "no images in the train split"),
        (members(), {"key": "other.zip"}, "other.zip: no such file"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, entries, changes, message):
    zipped(tmp_path, entries)
    with pytest.raises(InputError) as caught:
        load_images(folder(**{"calibration": 0.0, **changes}), "train", tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 40, 0.5])
def test_a_file_that_is_no_whole_zip_is_one_line(tmp_path, keep):
    zipped(tmp_path, members())
    content = (tmp_path / "images.zip").read_bytes()
    (tmp_path / "images.zip").write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(InputError, match="not a whole zip"):
        load_images(folder(), "train", tmp_path)


def test_no_calibration_share_means_no_calibration_split(tmp_path):
    zipped(tmp_path, members())
    with pytest.raises(InputError, match="no images in the calibration split"):
        load_images(folder(calibration=0.0), "calibration", tmp_path)


# --- what a stranger's images may cost and start


def saved(array, form="PNG"):
    content = io.BytesIO()
    Image.fromarray(array).save(content, form)
    return content.getvalue()


def with_image(path, content, name="test/cat/00.png"):
    return zipped(path, {**members(), name: content})


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_grey_images_of_16_bits_are_read_by_their_upper_eight(tmp_path_factory, data):
    seed = data.draw(st.integers(0, 2**31))
    array = np.random.default_rng(seed).integers(0, 2**16, (8, 8), dtype=np.uint16)
    found = [
        _fit(Image.open(io.BytesIO(content)), mode, 8, 8)
        for content in (saved(array), saved((array >> 8).astype(np.uint8)))
        for mode in ("L", "RGB")
    ]
    assert np.array_equal(found[0], array >> 8)
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[1], found[3])


@given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 40), st.integers(0, 30), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_the_ends_of_long_images_alone_are_cut_before_scaling(width, height, size, more, seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    scale = (size + more) / min(width, height)
    sides = [max(size + more, round(side * scale)) for side in (width, height)]
    x, y = ((side - size) // 2 for side in sides)
    expected = image.resize(sides, Image.Resampling.BILINEAR).crop((x, y, x + size, y + size))
    found = _fit(image, "RGB", size, size + more)
    assert found.size == (size, size)
    if max(width, height) <= THIN * min(width, height):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1)])
def test_a_thin_image_costs_what_it_holds(tmp_path, size):
    zipped(tmp_path, {**members(), "test/cat/00.png": png(77, size)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = load_images(folder(size=224, channels=1), "test", tmp_path).images
    assert sum((image == 77).all().item() for image in images) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def header(width, height):
    """A PNG that says it is this large and holds one row."""
    content = bytearray(png(0, (1, 1)))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


@pytest.mark.parametrize(
    ("size", "limits", "allowed"),
    [
        ((13_000, 13_000), {}, 50_000_000),
        ((60_000_000, 1), {}, 50_000_000),
        ((101, 100), {"pixels": 10_000}, 10_000),
    ],
)
def test_pixels_are_counted_in_the_header(tmp_path, size, limits, allowed):
    with_image(tmp_path, header(*size))
    with pytest.raises(InputError) as caught:
        load_images(folder(limits=limits), "test", tmp_path)
    found = f"images.zip: test/cat/00.png: found {size[0]} x {size[1]} pixels; allowed: {allowed} "
    assert found in str(caught.value)


def test_the_limit_grows_with_what_is_asked_for():
    Decoder("x", None, 4000, 4000, 3, "upright")._check_pixels("a", 8000, 8000)
    with pytest.raises(InputError, match="allowed: 64000000"):
        Decoder("x", None, 4000, 4000, 3, "upright")._check_pixels("a", 8000, 8001)


@pytest.mark.parametrize("form", ["EPS", "TIFF", "PPM", "ICO", "TGA", "PCX"])
def test_other_formats_by_the_name_of_an_image_are_refused_and_start_nothing(tmp_path, monkeypatch, form):
    with_image(tmp_path, saved(np.zeros((16, 16, 3), np.uint8), form))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("started a program"))
    with pytest.raises(InputError, match=r"00\.png: not a readable image; allowed: JPEG, PNG"):
        load_images(folder(), "test", tmp_path)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "GIF"])
def test_an_image_is_what_its_content_says(tmp_path, form):
    for name in ("test/cat/00.jpg", f"test/cat/00.{form.lower()}"):  # and under its own name
        with_image(tmp_path, saved(np.full((8, 8, 3), 90, np.uint8), form), name)
        images = load_images(folder(), "test", tmp_path).images.float()
        assert ((images - 90).abs().amax((1, 2, 3)) < 4).any()
