"""What all layers of one merge have in common: the networks, how they are aligned, and the settings of the fit."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from stages.core.align.alignment import Alignment
from stages.core.graph.folding import exclusive_norms
from stages.core.graph.nodes import Node
from stages.core.graph.source import Source
from stages.core.merged.copies import exact_entries
from stages.core.merged.network import MergedNetwork
from stages.core.recipe.methods import Fit
from stages.core.runtime.errors import InputError


@dataclass(frozen=True)
class Setup:
    """A merged ``network`` and the ``sources`` it is fitted to, units in merged order, seen through ``alignment``.

    ridge: relative to the mean diagonal of G, or chosen by images held out, layer by layer (auto); a ridge of ``fit``
    comes first. positions: share of a feature map's positions that is used, drawn with ``generator``. owned: whether
    every image has a task. one_size: whether all images are of one, the trace's.
    """

    network: MergedNetwork
    sources: Sequence[Source]
    fit: Fit
    ridge: float | Literal["auto"] = "auto"
    positions: float = 1.0
    generator: torch.Generator | None = None
    alignment: Alignment | None = None
    owned: bool = True
    one_size: bool = True

    def __post_init__(self) -> None:
        fixed = {
            "generator": self.generator or torch.Generator().manual_seed(0),
            "alignment": self.alignment or Alignment(len(self.sources)),
        }
        if self.fit.ridge is not None:
            fixed["ridge"] = self.fit.ridge
        for name, value in fixed.items():
            object.__setattr__(self, name, value)

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """For each value which entries are copies of a source's, to be left alone: bool (merged width,)."""
        return exact_entries(self.network)

    @cached_property
    def norms(self) -> dict[str, Node]:
        """{linear node: the batch norm that alone reads it}."""
        return exclusive_norms(self.network.trace.graph)

    @cached_property
    def folded(self) -> dict[str, Node]:
        """Of those, where the layer is fitted to what the batch norm behind it gives."""
        return {
            name: norm
            for name, norm in self.norms.items()
            if self.fit.norm == "fold" and "weight" in norm.parameters
        }

    @cached_property
    def scaled(self) -> dict[str, Node]:
        """Of those, where the alignment mixes units, which then have the scale that the batch norm gives them."""
        layouts = self.network.trace.layouts
        return {
            name: norm
            for name, norm in self.norms.items()
            if self.alignment.touches(layouts[name]) and "weight" in norm.parameters
        }

    def check_one_size(self, what: str) -> None:
        """Gate of what takes images out of their batches and puts them together."""
        if not self.one_size:
            raise InputError(f"fit: found {what} with images of several sizes; allowed: images of one size")

    def own_rows(self, node: Node) -> bool:
        """Heads of separate label spaces are fitted on their own task's rows, where images have a task."""
        separate = self.network.labels == "separate" and node is self.network.head
        return separate and self.owned
