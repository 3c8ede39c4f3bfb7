"""The notebook face: merge plain torch modules in memory, by the same functions as the pipeline.

from stages import merge, load_merged
merged = merge({"a": net_a, "b": net_b}, {"a": batches_a, "b": batches_b}, budget=1.2)
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stages.allocate.splits import split_units
from stages.core.align.order import align
from stages.core.align.solve import make_alignment
from stages.core.graph.source import Source, Task
from stages.core.merged.file import load_merged
from stages.core.merged.network import MergedNetwork
from stages.core.recipe.known import known_methods
from stages.core.recipe.methods import MatchSettings, Method
from stages.core.recipe.rooms import check_match, check_row
from stages.core.recipe.sections import Options
from stages.core.runtime.device import generator
from stages.core.runtime.errors import InputError
from stages.core.settings.params import first_line
from stages.core.sweep.batches import Batch
from stages.core.tracing.sources import make_sources
from stages.core.units.moments import pool
from stages.fit.network import fit_network
from stages.inspection import inspect
from stages.match.matching import make_matching
from stages.recalibrate.recalibrate import recalibrate as recalibrate_network
from stages.statistics.moments import gather

__all__ = ["inspect", "load_merged", "merge"]


def merge(
    networks: Mapping[str, nn.Module],
    batches: Mapping[str, Iterable[Any]],
    budget: float = 1.0,
    method: str | Mapping[str, Any] = "progressive",
    *,
    labels: str | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> MergedNetwork:
    """Merge networks of one architecture that were trained apart, without labels and without training.

    networks: task name -> module; any that torch.export reads as operations that have a rule. They are left alone.
    batches: task name -> unlabelled images of that task as the network takes them: a DataLoader or any iterable of
    tensors (n, ...), of tuples whose first entry is one, or of mappings that hold one (labels are not looked at).
    budget: cost relative to one network, from 1 to N. method: a row of the full list of params.yaml by its name, as
    `progressive_refined`, or one of your own, {"match": ..., "fit": ..., "recalibrate": ...}, as there. labels: shared
    (one label space), separate (a head each); by default shared when all have as many classes. classes: class names of
    each task, by default numbers. options: what is rarely said: seed, ridge, positions, storage, memory, allocate
    (stages.core.recipe.sections.Options). Runs on the device of the first network; ``report()`` of what it returns is a
    table of layers and costs. Raises InputError in one line.
    """
    names = list(networks)
    if set(batches) != set(names):
        raise InputError(
            f"batches: found tasks {sorted(batches)}; allowed: those of networks, {sorted(names)}"
        )
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 1 <= budget <= len(names):
        raise InputError(f"budget: found {budget!r}; allowed: a number from 1 to {len(names)}")
    row, settings = _row(method)
    rare = _checked(Options, "options", options or {})
    found = _batches(networks, batches)
    sources, labels = _sources(networks, found, labels, classes)
    sweep = {"storage": getattr(torch, rare.storage), "memory": rare.memory}
    drawn = {"generator": generator(rare.seed), "positions": rare.positions}
    gathered = gather(sources, found, **sweep, **drawn, progress="statistics" if progress else None)
    statistics = pool(gathered, len(names), len(names))
    matching, benefits = make_matching(sources, settings, statistics, generator(rare.seed))
    splits, allocation, base = split_units(
        sources[0], benefits, float(budget), len(names), labels, rare.allocate
    )
    alignment = make_alignment(settings, sources, lambda: statistics, matching, splits)
    reached = {"asked": float(budget), "reached": allocation.cost / base, "counted": rare.allocate.cost}
    network, record = fit_network(
        sources,
        matching,
        splits,
        found,
        row.fit,
        labels=labels,
        alignment=alignment,
        ridge=rare.ridge,
        **sweep,
        **{**drawn, "generator": generator(rare.seed)},
        about={"budget": reached, "method": {**row.model_dump(), "match": settings.model_dump()}},
        progress="fit" if progress else None,
    )
    network.about["residuals"] = {line.layer: line.residual for line in record}
    bar = "recalibrate" if progress else None
    aligned = align(sources, matching, splits)
    recalibrate_network(network, row.recalibrate, found, aligned, alignment, **sweep, progress=bar)
    return network


def _row(method: str | Mapping[str, Any]) -> tuple[Method, MatchSettings]:
    """A row and its matching: of the full list, or given; what is left out is that of `progressive`."""
    known = known_methods()
    if isinstance(method, str):
        if method not in known.methods:
            raise InputError(f"method: found {method!r}; allowed: {', '.join(known.methods)}, or a mapping")
        method = known.methods[method].model_dump(exclude_unset=True)
    elif not isinstance(method, Mapping):
        raise InputError(f"method: found {method!r}; allowed: a name or a mapping")
    row = {**known.methods["progressive"].model_dump(exclude_unset=True), **method}
    match = row["match"]
    if isinstance(match, Mapping):
        settings = _checked(MatchSettings, "match", match)
    elif match in known.match:
        settings = known.match[match]
    else:
        raise InputError(f"match: found {match!r}; allowed: {', '.join(known.match)}, or a mapping")
    found = _checked(Method, "", {**row, "match": "given"})
    check_match(settings)
    check_row(found)
    if "proxy" in (found.data, settings.data):
        raise InputError("method: found data: proxy; allowed: own, the images that are given")
    return found, settings


def _checked(section: type, name: str, given: Mapping[str, Any]) -> Any:
    try:
        return section.model_validate(dict(given))
    except ValidationError as error:
        raise InputError(first_line(error, section, name)) from error


def _batches(networks: Mapping[str, nn.Module], batches: Mapping[str, Iterable[Any]]) -> list[Batch]:
    first = next(iter(networks.values()))
    tensor = next(first.parameters(), None)
    if tensor is None:
        raise InputError(f"{type(first).__name__}: has no parameters; allowed: a trained network")
    found = []
    for task, name in enumerate(networks):
        given = [batches[name]] if isinstance(batches[name], Tensor) else batches[name]
        own = [_images(batch, name) for batch in given]
        if not own or not all(map(len, own)):
            raise InputError(f"batches: task {name} has none or an empty one; allowed: tensors of images")
        found += [
            Batch(batch.to(tensor.device, tensor.dtype if batch.is_floating_point() else None), task)
            for batch in own
        ]
    return found


def _images(batch: Any, task: str) -> Tensor:
    """Of one batch: a tensor, the first entry of a tuple, or the one tensor of a mapping that can be images."""
    if isinstance(batch, Mapping):
        kinds = {key: own for key, own in batch.items() if isinstance(own, Tensor)}
        images = {
            key: own for key, own in kinds.items() if own.is_floating_point() and own.dim() > 1
        } or kinds
        if len(images) != 1:
            keys = ", ".join(map(str, images or batch)) or "nothing"
            raise InputError(
                f"batches: task {task} has a mapping with {keys}; allowed: one tensor of images in each"
            )
        return next(iter(images.values()))
    batch = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(batch, Tensor) or batch.dim() < 2:
        kind = (
            f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        )
        raise InputError(f"batches: task {task} has {kind}; allowed: tensors of images, (n, ...)")
    return batch


def _sources(
    networks: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    labels: str | None,
    classes: Mapping[str, Sequence[str]] | None,
) -> tuple[list[Source], str]:
    """The sources, and whether their labels are shared or separate."""
    example = batches[0].images[:2]
    tasks = []
    for index, (name, network) in enumerate(networks.items()):
        own = next(batch.images for batch in batches if batch.task == index)[:1]
        with torch.no_grad():  # a copy: the modules of a network can be in different modes
            width = copy.deepcopy(network).eval()(own.to(next(network.parameters()).device)).shape[1]
        given = (classes or {}).get(name, [str(index) for index in range(width)])
        tasks.append(Task(name, tuple(given)))
    widths = {len(task.classes) for task in tasks}
    if labels not in (None, "shared", "separate"):
        raise InputError(f"labels: found {labels!r}; allowed: shared, separate")
    chosen = labels or ("shared" if len(widths) == 1 else "separate")
    return make_sources(list(networks.values()), tasks, example, chosen), chosen
