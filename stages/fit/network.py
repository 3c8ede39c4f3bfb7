"""The whole fit as one function: aligned sources in, merged network out, with its gates."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from stages.core.align.alignment import Alignment
from stages.core.align.order import align, merged_units
from stages.core.graph.compare import always_shared
from stages.core.graph.source import Source
from stages.core.merged.cost import check_built, split_cost
from stages.core.merged.network import MergedNetwork
from stages.core.merged.ranges import check_values
from stages.core.recipe.methods import Fit
from stages.core.runtime.cache import Storage
from stages.core.runtime.errors import InputError
from stages.core.sweep.batches import Batch, bounded
from stages.core.sweep.exact import fingerprint
from stages.core.sweep.memory import check_memory, place_values
from stages.core.sweep.norms import set_statistics
from stages.core.sweep.sweep import Sweep
from stages.core.units.matching import Matching, UnitSplit
from stages.fit.average import fill_average
from stages.fit.equations.ridge import apart
from stages.fit.held_out import Images
from stages.fit.refine import refine
from stages.fit.setup import Setup
from stages.fit.visitor import FitVisitor, LayerFit


def fit_network(
    sources: Sequence[Source],
    matching: Matching,
    splits: Mapping[str, UnitSplit],
    batches: Sequence[Batch],
    fit: Fit,
    *,
    labels: str,
    dense: bool = False,
    alignment: Alignment | None = None,
    ridge: float | Literal["auto"] = "auto",
    positions: float = 1.0,
    precision: torch.dtype = torch.float32,
    storage: Storage = "memory",
    memory: float | None = None,
    generator: torch.Generator | None = None,
    about: Mapping[str, Any] | None = None,
    unlabelled: Sequence[Images] | None = None,
    shift: int = 0,
    flip: bool = False,
    progress: str | None = None,
) -> tuple[MergedNetwork, list[LayerFit]]:
    """Merge ``sources`` with a matching and a split of its units.

    batches: unlabelled images of every task, or of none, on the sources' device. dense: every unit may read every unit.
    alignment: what is done to the shared units beyond pairing them. ridge: see stages.fit.equations.solve; auto: chosen
    for each layer (stages.fit.equations.ridge). precision, storage: type in which values are kept, and where.
    memory: GiB, None for what is free. unlabelled, shift, flip: images that refining sees, by default those of
    ``batches``, and how the sources' training moves them. Returns the network and each layer's residual; its
    ``about["refined"]`` is the record of refining. Raises InputError when it would not fit in memory, AssertionError
    when a gate fails.
    """
    aligned, alignment = align(sources, matching, splits), alignment or Alignment(len(sources))
    network = build(aligned, matching, splits, labels, about or {}, dense)
    fill_average(network, aligned, alignment)
    owned = all(batch.task >= 0 for batch in batches)
    one_size = len({batch.shape for batch in batches}) <= 1
    setup = Setup(network, aligned, fit, ridge, positions, generator, alignment, owned, one_size)
    if fit.refine is not None:
        setup.check_one_size("refine")
    record = fit_layers(setup, batches, precision, storage, memory, progress)
    if fit.refine is not None:
        network.about["refined"] = refine(
            network,
            aligned,
            unlabelled or images_of(batches, len(aligned) if owned else 1, fit.refine.images),
            fit.refine,
            alignment=alignment,
            owned=owned,
            shift=shift,
            flip=flip,
            generator=generator,
            memory=memory,
            progress=progress and f"{progress}: refine",
        )
    formula = partial(split_cost, network.trace, aligned[0].state, labels)
    for kind in ("macs", "parameters"):
        check_built(network, kind, formula(kind, network.shared, len(aligned), dense))
    check_separate(network, aligned, batches[0].images)
    try:
        check_values(network.state_dict())
    except InputError as error:
        raise InputError(
            f"fit: {fit.solver} gives no numbers: {error}; try a smaller learning_rate or a larger ridge"
        ) from error
    return network, record


def images_of(batches: Sequence[Batch], sets: int, most: int | Literal["all"]) -> list[Tensor]:
    """The first images of each task in one tensor; those of no task, of one set, in the first. Empty without any."""
    kinds = [[b.images for b in batches if max(b.task, 0) == task] for task in range(sets)]
    whole = [torch.cat(own) if own else batches[0].images[:0] for own in kinds]
    return whole if most == "all" else [own[:most] for own in whole]


def build(
    aligned: Sequence[Source],
    matching: Matching,
    splits: Mapping[str, UnitSplit],
    labels: str,
    about: Mapping[str, Any],
    dense: bool = False,
) -> MergedNetwork:
    """The merged network, all weights zero, on the sources' device and of their type."""
    shared = {name: len(split.shared) for name, split in splits.items()}
    hashes = {s.task.name: s.about["sha256"] for s in aligned if "sha256" in s.about}
    network = MergedNetwork(
        aligned[0].trace,
        [s.task for s in aligned],
        labels,
        shared,
        merged_units(matching, splits),
        {**about, "sources": hashes},
        dense,
    )
    tensors = aligned[0].state.values()
    example = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
    return network.to(device=example.device, dtype=example.dtype)


def fit_layers(
    setup: Setup,
    batches: Sequence[Batch],
    precision: torch.dtype | None = None,
    storage: Storage = "memory",
    memory: float | None = None,
    progress: str | None = None,
) -> list[LayerFit]:
    """Fit every layer of the setup's network, in place, in one sweep over the images; none where nothing is fitted."""
    visitor = FitVisitor(setup)
    if not visitor.fits:
        return []
    if visitor.whole is not None:
        network, place = setup.network, (precision, storage, memory)
        setup.check_one_size(f"solver {setup.fit.solver}")
        check_memory(visitor.whole.bytes(), memory, batches[0].images.device, "fit", "a smaller batch_size")
        visitor.fit_whole(images_of(batches, network.networks, visitor.whole.images), progress)
        set_statistics(network, visitor.setup.exact, batches, *place, progress, "fit", same=True)
        return visitor.record
    running = setup.network if visitor.setup.fit.inputs == "merged" else None
    seen = apart(bounded(batches, setup.network.trace)) if visitor.setup.ridge == "auto" else batches
    sweep = Sweep(setup.sources, seen, running, precision)
    place_values(sweep, visitor, storage, memory, "fit")
    sweep.run(visitor, progress)
    if running is not None:  # batch norms have the exact statistics of these images
        running.about["exact"] = fingerprint(running, batches, precision)
    return visitor.record


@torch.no_grad()
def check_separate(network: MergedNetwork, aligned: Sequence[Source], images: Tensor) -> None:
    """Gate: everything separate gives exactly the sources' features side by side.

    Tensors that act on the input itself, or whose units meet its features one by one, are the same for all at every
    budget; what is behind them is no source's own then.
    """
    if any(network.shared.values()) or network.head is None or always_shared(aligned):
        return
    merged = network.features(images)
    name = network.head.inputs[0]
    for source, positions in zip(aligned, network.arrangement(name).positions, strict=True):
        expected = source.features(images)
        found = merged.index_select(network.trace.layouts[name].dim, positions.to(merged.device))
        tolerance = 1e-4 if expected.dtype == torch.float32 else 1e-7
        if (found - expected).abs().max() > tolerance * (1 + expected.abs().max()):
            group = network.trace.layouts[name].segments[0].group
            raise AssertionError(
                f"group {group}: everything is separate, but task {source.task.name}'s features changed"
            )
