"""Data sets of a few tiny images, written in their official formats: name in the archive -> content.

The grey of an image says which it is: 10 * class + its number, and 100 more in the test split.
"""

import io
import pickle
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

TRAIN, TEST = 4, 2  # images of each class


def jpg(value, size=(16, 16), mode="L"):
    content = io.BytesIO()
    Image.new(mode, size, value).save(content, "JPEG")
    return content.getvalue()


def grey(label, number, part):
    return 10 * label + number + (100 if part == "test" else 0)


def each(classes):
    """(class index, class, part, number) of every image."""
    for label, name in enumerate(classes):
        for part, count in (("train", TRAIN), ("test", TEST)):
            for number in range(count):
                yield label, name, part, number


def folder(classes=("cat", "dog"), top=""):
    return {f"{top}{part}/{c}/{i}.jpg": jpg(grey(n, i, part)) for n, c, part, i in each(classes)}


def pets(top=""):
    files, lists = {}, {"train": "", "test": ""}
    for n, breed, part, i in each(("Abyssinian", "american_bulldog")):
        name = f"{breed}_{i + 10 * (part == 'test')}"
        files[f"{top}images/{name}.jpg"] = jpg(grey(n, i, part))
        lists[part] += f"{name} {n + 1} {n + 1} 1\n"
    files[f"{top}annotations/trainval.txt"] = lists["train"].encode()
    files[f"{top}annotations/test.txt"] = lists["test"].encode()
    files[f"{top}annotations/._trimaps"] = b"not text \xff"
    return files


def birds(top, classes, numbers, more=()):
    """CUB and NABirds share their layout; ``more``: further lines of classes.txt."""
    files, lists = {}, dict.fromkeys(("images", "image_class_labels", "train_test_split"), "")
    for k, (n, name, part, i) in enumerate(each(classes)):
        file, image = f"{name.replace(' ', '_')}/{k:04}.jpg", f"00-{k}"
        files[f"{top}images/{file}"] = jpg(grey(n, i, part))
        lists["images"] += f"{image} {file}\n"
        lists["image_class_labels"] += f"{image} {numbers[n]}\n"
        lists["train_test_split"] += f"{image} {int(part == 'train')}\n"
    named = [*more, *(f"{number} {name}" for number, name in zip(numbers, classes, strict=True))]
    lists["classes"] = "\n".join(named) + "\n"
    return files | {f"{top}{name}.txt": text.encode() for name, text in lists.items()}


def cub():
    return birds("CUB_200_2011/", ("001.Black_footed_Albatross", "002.Laysan_Albatross"), (1, 2))


def nabirds():
    """Two leaves of the same name, numbered so that 9 comes before 10; and inner classes without images."""
    return birds("nabirds/", ("Junco", "Junco", "Owl (Adult Male)"), (9, 10, 295), ("0 Birds", "3 Owl"))


def dogs(images="", lists=""):
    files, rows = {}, {"train": [], "test": []}
    for n, breed, part, i in each(("n02085620-Chihuahua", "n02085782-Japanese_spaniel")):
        file = f"{breed}/{breed[:9]}_{i + 10 * (part == 'test')}.jpg"
        files[f"{images}Images/{file}"] = jpg(grey(n, i, part))
        rows[part].append((file, n + 1))
    for part, found in rows.items():
        cells = np.array([[file] for file, _ in found], dtype=object)
        labels = np.array([[label] for _, label in found], dtype=np.uint8)
        content = io.BytesIO()
        savemat(content, {"file_list": cells, "annotation_list": cells, "labels": labels})
        files[f"{lists}{part}_list.mat"] = content.getvalue()
    return files


def domainnet(domain="clipart", classes=("aircraft_carrier", "zebra", "The_Eiffel_Tower")):
    """The official numbers ignore case, so they are not those of sorted folder names."""
    files, lists = {}, {"train": "", "test": ""}
    for n, name, part, i in each(classes):
        file = f"{domain}/{name}/{domain}_{n:03}_{i + 10 * (part == 'test'):06}.jpg"
        files[file] = jpg(grey(n, i, part))
        lists[part] += f"{file} {n}\n"
    return files, {f"{domain}_{part}.txt": text.encode() for part, text in lists.items()}


def imagenet(val_folders=True):
    files = {}
    for n, wnid, part, i in each(("n01440764", "n01443537")):
        file = f"train/{wnid}/{wnid}_{i}.JPEG"
        if part == "test":
            file = f"val/{wnid if val_folders else '.'}/ILSVRC2012_val_{n}{i}.JPEG".replace("/./", "/")
        files[file] = jpg(grey(n, i, part))
    return files


def cifar(hundred=False, python2=True, classes=(b"airplane", b"bird", b"cat")):
    """Batches as the official files: protocol 2, keys and texts of Python 2 (byte strings)."""
    rows = {"train": [], "test": []}
    for n, _, part, i in each(classes):
        pixels = np.full((3, 32, 32), grey(n, i, part), np.uint8)
        pixels[0, 0, :2] = (1, 2)  # red, the first two of the first row
        rows[part].append((n, pixels.reshape(-1)))

    def batch(found):
        data = np.stack([pixels for _, pixels in found])
        labels = [label for label, _ in found]
        names = [b"fine_labels", b"coarse_labels"] if hundred else [b"labels"]
        return {b"data": data, b"batch_label": b"batch", **dict.fromkeys(names, labels)}

    if hundred:
        files = {"cifar-100-python/train": batch(rows["train"]), "cifar-100-python/test": batch(rows["test"])}
        files["cifar-100-python/meta"] = {b"fine_label_names": list(classes), b"coarse_label_names": [b"all"]}
    else:
        top, parts = "cifar-10-batches-py/", np.array_split(np.arange(len(rows["train"])), 5)
        files = {
            f"{top}data_batch_{k + 1}": batch([rows["train"][i] for i in part])
            for k, part in enumerate(parts)
        }
        files[f"{top}test_batch"] = batch(rows["test"])
        files[f"{top}batches.meta"] = {b"label_names": list(classes), b"num_vis": 3072}
    write = _python2 if python2 else pickle.dumps
    return {name: write(value) for name, value in files.items()}


class _Python2(pickle._Pickler):  # the one written in Python lets a type be overridden
    """Writes bytes as Python 2 wrote its str."""

    def save_bytes(self, content):
        if len(content) < 256:
            self.write(b"U" + bytes([len(content)]) + content)
        else:
            self.write(b"T" + len(content).to_bytes(4, "little") + content)
        self.memoize(content)

    dispatch = pickle._Pickler.dispatch | {bytes: save_bytes}


def _python2(value):
    out = io.BytesIO()
    _Python2(out, protocol=2).dump(value)
    return out.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")  # NumPy 1


def pack(path, files, kind=None):
    """Write an archive; ``kind``: zip, stored, tar, tgz, or by the name of ``path``."""
    kind = kind or {".zip": "zip", ".tar": "tar"}.get(path.suffix, "tgz")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in ("zip", "stored"):
        method = zipfile.ZIP_DEFLATED if kind == "zip" else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def packed(files, kind):
    """The bytes of an archive."""
    with tempfile.TemporaryDirectory() as folder:
        return pack(Path(folder) / "x", files, kind).read_bytes()
