"""What the images of a task may come in: a tensor, a Dataset, a DataLoader or any iterable, of batches or of images."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import psutil
import torch
from torch import Tensor

from stages.core.runtime.errors import InputError
from stages.core.runtime.surroundings import users_code

FORMS = "tensors (n, ...) as the network takes them, tuples or dicts with one, or a Dataset"
KEYS = ("image", "images", "pixel_values", "input", "inputs", "x", "input_ids")  # of a dict
MOST_IMAGES = 2**20  # that are read of a task where nobody says how many
TOGETHER = 64  # single images to a batch

Runs = Callable[[Tensor], Tensor]


def read_images(given: Any, what: str, runs: Runs, images: int | None) -> list[Tensor]:
    """Batches (n, ...) of one task.

    runs: the network's logits for a batch, or an InputError: whether an entry is a batch or one image is seen by
    trying. images: at most so many are read; None: all, up to ``MOST_IMAGES`` and half of the free memory.
    Raises InputError that says what was found and what is expected.
    """
    items = _items(given, what)
    head = next(items, items)
    if head is items:
        raise InputError(f"{what} has none or an empty one; allowed: {FORMS}")
    first = _tensor_of(head, what)
    single = _is_single(first, runs, _is_dataset(given))
    lists = single and not _is_dataset(given)
    entries = (_tensor_of(item, what, lists) for item in itertools.chain([head], items))
    seen: set[tuple] = set()
    found: list[Tensor] = []
    count, size, free = 0, 0, psutil.virtual_memory().available // 2
    for entry in entries:
        key = (entry.shape if single else entry.shape[1:], entry.dtype)
        if key not in seen:
            runs(entry[None] if single else entry)
            seen.add(key)
        found.append(entry)
        count, size = count + (1 if single else len(entry)), size + entry.nbytes
        if images is not None and count >= images:
            break
        if count > MOST_IMAGES or size > free:  # an iterable may never end
            raise InputError(
                f"{what}: found {count} images, {size / 2**30:.1f} GiB, and no end; allowed: up to {MOST_IMAGES} and "
                "half of the free memory, or say how many: options={'images': 1000}"
            )
    whole = _stacked(found) if single else found
    return whole if images is None else _cut(whole, images)


def kind_of(value: Any) -> str:
    """A type's name for an error message."""
    return "None" if value is None else type(value).__name__


def _is_dataset(given: Any) -> bool:
    """Whether entries are asked for by number, each one image."""
    by_number = not isinstance(given, torch.utils.data.IterableDataset)
    return isinstance(given, torch.utils.data.Dataset) and by_number and hasattr(given, "__len__")


def _items(given: Any, what: str) -> Iterator[Any]:
    """One entry after the other, batch or image, with what is beside it."""
    several = isinstance(given, tuple | list) and len(given) > 1
    pair = several and all(isinstance(own, Tensor) for own in given[:2])
    labelled = pair and given[1].dim() == 1 and len(given[0]) == len(given[1]) and given[0].dim() > 1
    if isinstance(given, Tensor | Mapping) or labelled:
        given = [given]
    elif isinstance(given, str | bytes | torch.nn.Module) or not (
        isinstance(given, Iterable) or _is_dataset(given)
    ):
        raise InputError(f"{what}: found {kind_of(given)}; allowed: {FORMS}")
    with users_code(f"{what}: reading its images", FORMS):
        items = (given[i] for i in range(len(given))) if _is_dataset(given) else iter(given)
    while True:
        with users_code(f"{what}: reading its images", FORMS):
            item = next(items, items)
        if item is items:
            return
        yield item


def _tensor_of(item: Any, what: str, lists: bool = False) -> Tensor:
    """A tensor, the first of a tuple, or that of a dict which can be meant.

    lists: the tensors are single images, so that several in one entry are a batch that nobody has stacked.
    """
    found = item
    if isinstance(item, Mapping):
        held = [key for key in KEYS if isinstance(item.get(key), Tensor)]
        if len(held) != 1:
            raise InputError(
                f"{what}: found a dict of {', '.join(map(str, item))}; allowed: one of {', '.join(KEYS)}"
            )
        found = item[held[0]]
    elif isinstance(item, tuple | list) and item:
        found = item[0]
        later = [own for own in item[1:] if isinstance(own, Tensor)]
        if lists and any(own.dim() == found.dim() and own.shape[:1] == found.shape[:1] for own in later):
            raise InputError(
                f"{what}: found {len(item)} images in a {kind_of(item)}; allowed: one tensor of them (torch.stack)"
            )
        if (
            isinstance(found, Tensor)
            and found.dim() < 2
            and any(own.dim() > found.dim() + 1 for own in later)
        ):
            raise InputError(
                f"{what}: found labels before images, {tuple(found.shape)}; allowed: images first"
            )
    if not isinstance(found, Tensor):
        raise InputError(f"{what}: found {kind_of(found)}; allowed: {FORMS}")
    check_ordinary(found, what)
    if found.dtype == torch.bool or found.is_complex() or not found.dim():
        raise InputError(f"{what}: found {found.dtype}, {tuple(found.shape)}; allowed: images or tokens")
    if not found.numel():
        raise InputError(f"{what} has none or an empty one; allowed: {FORMS}")
    return found


def check_ordinary(images: Tensor, what: str) -> None:
    """Raises InputError for a tensor that does not hold its numbers one after the other."""
    if images.is_meta or images.layout != torch.strided or images.is_nested or images.is_quantized:
        raise InputError(f"{what}: found a tensor that is meta, sparse or nested; allowed: ordinary tensors")


def _is_single(first: Tensor, runs: Runs, expected: bool) -> bool:
    """Whether an entry is one image. Raises the InputError of the likelier way where the network takes neither."""
    ways = [expected, not expected]
    errors = []
    for single in ways:
        try:
            runs(first[None] if single else first)
        except InputError as error:
            errors.append(error)
        else:
            return single
    raise errors[0]


def _stacked(images: list[Tensor]) -> list[Tensor]:
    """Images of one shape that follow each other in one batch."""
    found = []
    for _, own in itertools.groupby(images, key=lambda x: (x.shape, x.dtype)):
        rows = list(own)
        found += [torch.stack(rows[i : i + TOGETHER]) for i in range(0, len(rows), TOGETHER)]
    return found


def _cut(batches: list[Tensor], images: int) -> list[Tensor]:
    """The first images."""
    found = []
    for batch in batches:
        found.append(batch[:images])
        images -= len(found[-1])
        if images <= 0:
            break
    return found
