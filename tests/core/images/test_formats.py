"""Every data set in miniature, as its authors lay it out, packed as it is handed out."""

import os
import pickle

import miniatures as mini
import pytest
import torch

from stages.core.images.load import load_images
from stages.core.runtime.errors import InputError
from stages.core.settings.datasets import HOMES
from stages.core.settings.profiles import Data

SPLITS = ("train", "calibration", "test")
CLIPART, LISTS = mini.domainnet()

# kind -> (files, name of the official archive, classes)
OFFICIAL = {
    "folder": (mini.folder(), "own.zip", ("cat", "dog")),
    "cifar10": (mini.cifar(), "cifar-10-python.tar.gz", ("airplane", "bird", "cat")),
    "cifar100": (mini.cifar(hundred=True), "cifar-100-python.tar.gz", ("airplane", "bird", "cat")),
    "pets": (mini.pets(), "pets.zip", ("Abyssinian", "american_bulldog")),
    "cub": (mini.cub(), "CUB_200_2011.tgz", ("001.Black_footed_Albatross", "002.Laysan_Albatross")),
    "nabirds": (mini.nabirds(), "nabirds.tar.gz", ("Junco (9)", "Junco (10)", "Owl (Adult Male)")),
    "dogs": (mini.dogs(), "dogs.tar", ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")),
    "domainnet": (CLIPART | LISTS, "clipart.zip", ("aircraft_carrier", "zebra", "The_Eiffel_Tower")),
    "imagenet": (mini.imagenet(), "imagenet.tar", ("n01440764", "n01443537")),
}


def data(kind, key, **changes):
    domain = {"domain": "clipart"} if kind == "domainnet" else {}
    return Data(kind=kind, key=key, size=16 if "cifar" not in kind else 32, **domain, **changes)


def greys(images):
    return [round(value) for value in images.images[:, :, 5, 5].float().mean(1).tolist()]


def expected(classes, split):
    parts = ["test"] if split == "test" else ["train"]
    return sorted(mini.grey(n, i, part) for n, _, part, i in mini.each(classes) if part in parts)


@pytest.fixture
def refused(tmp_path):
    def run(kind, files, split="train", key="x.zip", **changes):
        mini.pack(tmp_path / key, files)
        with pytest.raises(InputError) as caught:
            load_images(data(kind, key, **changes), split, tmp_path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / key) in str(caught.value)
        return str(caught.value)

    return run


@pytest.mark.parametrize("kind", OFFICIAL)
def test_the_official_splits_and_labels(tmp_path, kind):
    files, key, classes = OFFICIAL[kind]
    mini.pack(tmp_path / key, files)
    found = {split: load_images(data(kind, key), split, tmp_path) for split in SPLITS}
    assert greys_of(found, "train", "calibration") == expected(classes, "train")  # disjoint, and together all
    assert greys_of(found, "test") == expected(classes, "test")
    assert len(found["calibration"]) == len(classes)  # a quarter of four, of each class
    assert found["calibration"].labels is None
    for split in ("train", "test"):
        assert found[split].classes == classes
        assert found[split].labels.tolist() == [grey % 100 // 10 for grey in greys(found[split])]


def greys_of(found, *splits):
    return sorted(grey for split in splits for grey in greys(found[split]))


@pytest.mark.parametrize("kind", OFFICIAL)
def test_a_class_subset_keeps_the_split_and_orders_the_labels(tmp_path, kind):
    files, key, classes = OFFICIAL[kind]
    mini.pack(tmp_path / key, files)
    chosen = [classes[1], classes[0]]
    for split in SPLITS:
        whole = load_images(data(kind, key), split, tmp_path)
        part = load_images(data(kind, key, classes=chosen), split, tmp_path)
        assert sorted(greys(part)) == sorted(grey for grey in greys(whole) if grey % 100 < 20)
    assert part.classes == tuple(chosen)
    assert part.labels.tolist() == [1 - grey % 100 // 10 for grey in greys(part)]


@pytest.mark.parametrize("kind", OFFICIAL)
@pytest.mark.parametrize("packing", ["zip", "stored", "tar", "tgz"])
def test_any_packing_gives_the_same_images(tmp_path, kind, packing):
    files, key, _ = OFFICIAL[kind]
    mini.pack(tmp_path / key, files)
    mini.pack(tmp_path / "other.zip", files, packing)  # the content decides, not the suffix
    for split in ("calibration", "test"):
        whole, other = (load_images(data(kind, k), split, tmp_path) for k in (key, "other.zip"))
        assert torch.equal(whole.images, other.images)


@pytest.mark.parametrize("kind", [kind for kind in OFFICIAL if kind != "folder"])
def test_another_archive_is_refused_with_what_was_looked_for_and_where_to_get_it(refused, kind):
    line = refused(kind, {"letters/readme.md": b"", "a.txt": b""})
    assert "found: a.txt, letters/" in line
    assert HOMES[kind] in line


@pytest.mark.parametrize("kind", [k for k in OFFICIAL if k not in ("folder", "imagenet")])
def test_any_lost_file_is_one_line_or_not_needed(tmp_path, kind):
    """Whatever one file a partial download lacks: the same images, or one line that says where to get them."""
    files, _, _ = OFFICIAL[kind]
    refusals = 0
    for number, lost in enumerate(files):
        key = f"{number}.zip"
        mini.pack(tmp_path / key, {name: content for name, content in files.items() if name != lost})
        line = complaint(data(kind, key), tmp_path)
        refusals += line is not None
        assert line is None or ("\n" not in line and HOMES[kind] in line), lost
    assert refusals >= len(files) - 1  # all but hidden entries


def complaint(found, root):
    try:
        load_images(found, "test", root)
    except InputError as error:
        return str(error)


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(InputError, match=r"cub\.tgz: no such file.*CUB-200-2011 from https://"):
        load_images(data("cub", "cub.tgz"), "train", tmp_path)


# --- what comes in several files, and archives inside archives


def test_data_sets_that_come_in_several_files(tmp_path):
    """Pets, Dogs and DomainNet as they are downloaded, file by file."""
    pets = mini.pets()
    mini.pack(tmp_path / "p/images.tar.gz", {n: c for n, c in pets.items() if n.startswith("images/")})
    mini.pack(
        tmp_path / "p/annotations.tar.gz", {n: c for n, c in pets.items() if n.startswith("annotations/")}
    )
    dogs = mini.dogs()
    mini.pack(tmp_path / "d/images.tar", {n: c for n, c in dogs.items() if n.startswith("Images/")})
    mini.pack(tmp_path / "d/lists.tar", {n: c for n, c in dogs.items() if n.endswith(".mat")})
    mini.pack(tmp_path / "n/clipart.zip", CLIPART)
    for name, content in LISTS.items():
        (tmp_path / "n" / name).write_bytes(content)
    for kind, key, also in (
        ("pets", "p/images.tar.gz", ["p/annotations.tar.gz"]),
        ("dogs", "d/images.tar", ["d/lists.tar"]),
        ("domainnet", "n/clipart.zip", ["n/clipart_train.txt", "n/clipart_test.txt"]),
    ):
        found = load_images(data(kind, key, also=also), "test", tmp_path)
        assert sorted(greys(found)) == expected(OFFICIAL[kind][2], "test")


@pytest.mark.parametrize("packing", ["zip", "stored", "tar", "tgz"])
@pytest.mark.parametrize("inner", ["zip", "tar", "tgz"])
def test_archives_inside_an_archive(tmp_path, packing, inner):
    suffix = {"zip": "zip", "tar": "tar", "tgz": "tar.gz"}[inner]
    mini.pack(tmp_path / "x.zip", {f"all/clipart.{suffix}": mini.packed(CLIPART, inner), **LISTS}, packing)
    found = load_images(data("domainnet", "x.zip"), "test", tmp_path)
    assert sorted(greys(found)) == expected(OFFICIAL["domainnet"][2], "test")


def test_imagenet_as_its_tar_of_tars(tmp_path):
    by_class = {}
    for name, content in mini.imagenet().items():
        if name.startswith("train/"):
            _, wnid, file = name.split("/")
            by_class.setdefault(f"{wnid}.tar", {})[file] = content
    mini.pack(tmp_path / "train.tar", {tar: mini.packed(files, "tar") for tar, files in by_class.items()})
    found = load_images(data("imagenet", "train.tar", calibration=0.5), "calibration", tmp_path)
    assert len(found) == 4
    assert found.classes == ("n01440764", "n01443537")


def test_imagenet_validation_images_serve_as_a_proxy_without_labels(tmp_path, refused):
    flat = {n: c for n, c in mini.imagenet(val_folders=False).items() if n.startswith("val/")}
    mini.pack(tmp_path / "val.tar", flat)
    found = load_images(data("imagenet", "val.tar", calibration=1.0), "calibration", tmp_path)
    assert sorted(greys(found)) == expected(("a", "b"), "test")
    assert "have no labels" in refused("imagenet", flat, "train")


# --- CIFAR


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("python2", [False, True])
def test_cifar_rows_become_images(tmp_path, hundred, python2):
    mini.pack(tmp_path / "c.tar.gz", mini.cifar(hundred, python2))
    found = load_images(data("cifar100" if hundred else "cifar10", "c.tar.gz"), "test", tmp_path)
    first = found.images[greys(found).index(mini.grey(1, 0, "test"))]
    assert first[:, 0, :3].tolist() == [[1, 2, 110], [110] * 3, [110] * 3]  # rows, not columns, and red first


def test_cifar_as_a_folder_of_images(tmp_path):
    mini.pack(tmp_path / "cifar10.zip", mini.folder(("airplane", "bird")))
    found = load_images(data("cifar10", "cifar10.zip"), "test", tmp_path)
    assert found.classes == ("airplane", "bird")
    assert found.images.shape == (4, 3, 32, 32)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, refused):
    bomb = pickle.dumps(Bomb(tmp_path / "ran"), protocol=2)
    for name in ("test_batch", "batches.meta"):
        files = {**mini.cifar(), f"cifar-10-batches-py/{name}": bomb}
        assert "mkdir, which could run code" in refused("cifar10", files)
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists()  # the bomb is live


BATCH = mini.cifar()["cifar-10-batches-py/test_batch"]


@pytest.mark.parametrize(
    "content", [b"", b"text", pickle.dumps([1]), pickle.dumps({b"data": [1], b"labels": [0]}), BATCH[:-900]]
)
def test_a_batch_that_is_none_is_one_line(refused, content):
    refused("cifar10", {**mini.cifar(), "cifar-10-batches-py/test_batch": content})


# --- lists that do not fit


def changed(files, ending, old, new):
    name = next(name for name in files if name.endswith(ending))
    assert old in files[name]
    return {**files, name: files[name].replace(old, new)}


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("pets", changed(mini.pets(), "test.txt", b"Abyssinian_10 1 1 1", b"Abyssinian_10 1 1"), "row 1: found 3"),
        ("pets", changed(mini.pets(), "test.txt", b"Abyssinian_10 1", b"Abyssinian_10 2"), "class 2 is both"),
        ("pets", changed(mini.pets(), "test.txt", b"Abyssinian_10 1", b"Abyssinian_10 one"), "found 'one'"),
        ("cub", changed(mini.cub(), "split.txt", b"00-0 1\n", b""), "lists other images than images.txt"),
        ("cub", changed(mini.cub(), "classes.txt", b"1 001.", b"7 001."), "no class 1"),
        ("cub", changed(mini.cub(), "labels.txt", b"00-0 1", b"00-0 x"), "found 'x'; allowed: a whole number"),
        ("dogs", {**mini.dogs(), "train_list.mat": b"no matrix"}, "not a MATLAB file"),
        ("domainnet", CLIPART | changed(LISTS, "train.txt", b"1.jpg 0", b"1.jpg 1"), "class 1 is both"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit_are_one_line(refused, kind, files, message):
    assert message in refused(kind, files)


# --- parameters


def test_classes_can_be_numbered_by_name_as_torchvision_numbers_folders(tmp_path):
    mini.pack(tmp_path / "c.zip", CLIPART | LISTS)
    found = load_images(data("domainnet", "c.zip", order="name"), "test", tmp_path)
    assert found.classes == ("The_Eiffel_Tower", "aircraft_carrier", "zebra")
    assert found.labels.tolist() == [(grey % 100 // 10 + 1) % 3 for grey in greys(found)]


def test_labels_can_be_the_data_sets_own_numbers_with_gaps(tmp_path, refused):
    """As checkpoints have them that were trained on the numbers of the lists, inner classes of a tree included."""
    mini.pack(tmp_path / "n.tgz", mini.nabirds())
    found = load_images(data("nabirds", "n.tgz", label_space=297), "test", tmp_path)
    assert len(found.classes) == 297
    assert [found.classes[i] for i in (0, 8, 9, 294)] == [
        "no class 0",
        "Junco (9)",
        "Junco (10)",
        "Owl (Adult Male)",
    ]
    assert found.labels.tolist() == [(8, 9, 294)[grey % 100 // 10] for grey in greys(found)]
    assert "label_space: found 200; allowed: 295 or more" in refused(
        "nabirds", mini.nabirds(), label_space=200
    )


def test_resize_scales_before_the_centre_is_cut_out(tmp_path):
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (64, 64), (255, 255, 255))
    ImageDraw.Draw(image).rectangle((16, 16, 47, 47), fill=(0, 0, 0))  # the middle half
    files = mini.folder()
    image.save(tmp_path / "x.png")
    files |= {"test/cat/0.jpg": (tmp_path / "x.png").read_bytes()}
    mini.pack(tmp_path / "f.zip", files)
    cut = load_images(data("folder", "f.zip", resize=32), "test", tmp_path).images
    assert cut.shape[-1] == 16
    assert any(image.float().mean() < 20 for image in cut)  # of the whole it would be 191


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "domainnet"}, "domain: found None for domainnet"),
        ({"kind": "cub", "domain": "real"}, "domain: found real for cub"),
        (
            {"kind": "cub", "label_space": 9, "classes": ["a", "b"]},
            "label_space: keeps the data set's own numbers",
        ),
        ({"kind": "cub", "label_space": 9, "order": "name"}, "label_space: keeps the data set's own numbers"),
        ({"kind": "cub", "resize": 15}, r"resize: found 15; allowed: size \(16\) or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Data(key="x.zip", size=16, **changes)


def test_two_classes_of_one_name_are_refused(tmp_path):
    mini.pack(tmp_path / "x.tar.gz", mini.cifar(classes=(b"airplane", b"bird", b"airplane")))
    with pytest.raises(InputError, match="found airplane as the name of two classes"):
        load_images(Data(kind="cifar10", key="x.tar.gz", size=32), "train", tmp_path)
