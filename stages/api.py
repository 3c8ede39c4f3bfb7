"""The notebook face: merge plain torch modules in memory, by the same functions as the pipeline.

from stages import merge, load_merged
merged = merge({"a": net_a, "b": net_b}, {"a": batches_a, "b": batches_b}, budget=1.2)
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stages.allocate.solve import check_budget
from stages.allocate.splits import split_units
from stages.core.align.order import align
from stages.core.align.solve import make_alignment
from stages.core.graph.inputs import of_shape, taking_counts
from stages.core.graph.source import Source, Task
from stages.core.merged.cost import relative
from stages.core.merged.file import load_merged
from stages.core.merged.network import MergedNetwork
from stages.core.recipe.known import known_methods
from stages.core.recipe.methods import MatchSettings, Method
from stages.core.recipe.rooms import ALIGNMENTS, check_match, check_row
from stages.core.recipe.sections import Options
from stages.core.runtime.device import generator
from stages.core.runtime.errors import LONGEST, InputError, shown, some
from stages.core.runtime.surroundings import undisturbed, users_code
from stages.core.settings.params import first_line, nearest
from stages.core.sweep.batches import Batch
from stages.core.tracing.sources import make_sources, traced_sources
from stages.core.units.moments import pool
from stages.fit.network import fit_network
from stages.given import checked_batches, checked_networks, checked_sizes, run_once, two_of
from stages.inspection import inspect
from stages.loaders import kind_of
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

    networks: task name -> module; any that torch.export reads as operations that have a rule, or a merged network,
    which is taken in its plain form. They are left alone. batches: task name -> unlabelled images of that task as the
    network takes them (floats; whole numbers where it makes floats of them, or tokens): tensors (n, ...), tuples whose
    first entry is one (labels are not looked at), dicts with one, in any iterable, as a DataLoader; one tensor; or a
    Dataset. budget: cost relative to one network, from 1 to N, of dense networks (options: allocate: layout) to N^2.
    method: a row of the full list of params.yaml by its name, as `progressive_refined`, or one of your own,
    {"match": ..., "fit": ..., "recalibrate": ...}, as there. labels: shared (one label space), separate (a head each);
    by default shared when all have as many classes. classes: class names of each task, by default numbers. options:
    what is rarely said: images, seed, ridge, positions, precision, storage, memory, allocate
    (stages.core.recipe.sections.Options).
    Runs on the device of the first network; autocast, default type and device, inference and gradient mode around the
    call change nothing, and random states are left as found. ``report()`` of what it returns is a table of layers and
    costs. Raises InputError in one line.
    """
    with undisturbed():
        return _merge(
            checked_networks(networks),
            batches,
            budget,
            method,
            labels=labels,
            classes=classes,
            options=options,
            progress=_yes(_plain(progress)),
        )


def _merge(
    networks: Mapping[str, nn.Module],
    batches: Any,
    budget: Any,
    method: Any,
    *,
    labels: Any,
    classes: Any,
    options: Any,
    progress: bool,
) -> MergedNetwork:
    names, budget = list(networks), _plain(budget)
    rare = _checked(Options, "options", {} if options is None else options)
    check_budget(budget, len(names), rare.allocate.dense)
    row, settings = _row(method)
    found, counted = checked_batches(networks, batches, rare.images, rare.storage)
    checked_sizes(networks, found)
    sources, labels = _sources(networks, found, labels, classes)
    sources = [taking_counts(source) for source in sources] if counted else sources
    sweep = {"precision": getattr(torch, rare.precision), "storage": rare.storage, "memory": rare.memory}
    drawn = {"generator": generator(rare.seed), "positions": rare.positions}
    permuted = settings.by not in ALIGNMENTS.names
    bar = "statistics" if progress else None
    gathered = gather(sources, found, **sweep, **drawn, pairs_only=permuted, progress=bar)
    statistics = pool(gathered, len(names), len(names))
    matching, benefits = make_matching(sources, settings, statistics, generator(rare.seed))
    spent = rare.allocate.spent(settings.allocate)
    splits, allocation, base = split_units(sources[0], benefits, float(budget), len(names), labels, spent)
    alignment = make_alignment(settings, sources, lambda: statistics, matching, splits)
    reached = {
        "asked": float(budget),
        "reached": relative(allocation.cost, base),
        "counted": rare.allocate.cost,
    }
    network, record = fit_network(
        sources,
        matching,
        splits,
        found,
        row.fit,
        labels=labels,
        dense=rare.allocate.dense,
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
            close = nearest(method[:LONGEST], known.methods)
            raise InputError(f"method: found {shown(method)}; allowed: {close}, or a mapping")
        method = known.methods[method].model_dump(exclude_unset=True)
    elif not isinstance(method, Mapping):
        raise InputError(f"method: found {shown(method)}; allowed: a name or a mapping")
    row = {**known.methods["progressive"].model_dump(exclude_unset=True), **method}
    match = row["match"]
    if isinstance(match, Mapping):
        settings = _checked(MatchSettings, "match", match)
    elif isinstance(match, str) and match in known.match:
        settings = known.match[match]
    else:
        close = nearest(shown(match), known.match)
        raise InputError(f"match: found {shown(match)}; allowed: {close}, or a mapping")
    found = _checked(Method, "", {**row, "match": "given"})
    check_match(settings)
    check_row(found)
    if "proxy" in (found.data, settings.data):
        raise InputError("method: found data: proxy; allowed: own, the images that are given")
    return found, settings


def _yes(value: Any) -> bool:
    if not isinstance(value, bool | None):
        raise InputError(f"progress: found {shown(value)}; allowed: True, False")
    return bool(value)


def _plain(value: Any) -> Any:
    """Numbers of NumPy and torch, fractions and decimals as Python's own, at any depth of a mapping."""
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, np.generic | np.ndarray) and not value.ndim:
        return value.item()
    if isinstance(value, Tensor) and not value.dim() and not value.is_meta:
        return value.item()
    if isinstance(value, Fraction | Decimal):
        with suppress(
            ValueError, OverflowError
        ):  # of a signalling NaN and beyond a float: refused as they are
            return float(value)
    return value


def _checked(section: type, name: str, given: Any) -> Any:
    if not isinstance(given, Mapping):
        raise InputError(f"{name}: found {shown(given)}; allowed: a mapping")
    try:
        return section.model_validate(_plain(dict(given)))
    except ValidationError as error:
        raise InputError(first_line(error, section, name)) from error


def _sources(
    networks: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    labels: str | None,
    classes: Mapping[str, Sequence[str]] | None,
) -> tuple[list[Source], str]:
    """The sources, and whether their labels are shared or separate."""
    if labels is not None and (not isinstance(labels, str) or labels not in ("shared", "separate")):
        raise InputError(f"labels: found {shown(labels)}; allowed: shared, separate")
    largest = max(batches, key=lambda batch: batch.shape.numel())  # what memory is reckoned with
    example, tasks = two_of(largest.images), []
    for index, (name, network) in enumerate(networks.items()):
        own = next(batch.images for batch in batches if batch.task == index)
        logits = run_once(network, own, f"task {name}")
        tasks.append(Task(name, _classes(classes, name, _width(network, logits, own))))
    if extra := set(classes or {}) - set(networks):
        raise InputError(f"classes: found task {min(map(str, extra))}; allowed: {some(networks)}")
    widths = {len(task.classes) for task in tasks}
    chosen = labels or ("shared" if len(widths) == 1 else "separate")
    sources = make_sources(list(networks.values()), tasks, example, chosen)
    for shape, images in {batch.shape: batch.images[:1] for batch in batches}.items():
        if shape != example.shape[1:]:
            with users_code("a network", f"images of one size, {of_shape(example.shape)}"):
                sources[0](images)
    return sources, chosen


def _width(network: nn.Module, logits: Tensor, images: Tensor) -> int:
    """How many classes the logits are of: those of each place or word may be behind the places."""
    if logits.dim() != 3:
        return logits.shape[1]
    (source,) = traced_sources([network], [Task("", ())], two_of(images))
    return source.trace.layouts[source.graph.output.name].width


def _classes(classes: Any, name: str, width: int) -> tuple[str, ...]:
    """The class names of a task, by default numbers."""
    if classes is not None and not isinstance(classes, Mapping):
        raise InputError(f"classes: found {kind_of(classes)}; allowed: a mapping of tasks to class names")
    given = (classes or {}).get(name)
    if given is None:
        return tuple(map(str, range(width)))
    texts = (
        isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(n, str) for n in given)
    )
    if not texts or len(set(given)) < len(given) or len(given) != width:
        found = some(given) if texts else shown(given)
        raise InputError(f"classes: task {name}: found {found}; allowed: {width} different names, texts")
    return tuple(given)
