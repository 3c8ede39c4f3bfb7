"""A layer that is fitted, as far as it is known before anything runs: its sizes, and what its rows hold in memory.

A batch's inputs and targets are assembled in the merged network's entries and made into rows some images at a time.
"""

from functools import cached_property

import torch
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.merged.blocks import Block
from stages.core.sweep.maps import MapSums, worthwhile
from stages.core.sweep.rows import kernel_of, tap_columns
from stages.core.sweep.shifted import Plan, plan
from stages.fit.setup import Setup

ROW_ENTRIES = 2**24  # entries of one im2col matrix, unless a single image has more


class Layer:
    """A Linear or Conv2d of the merged network. Seen as one matrix its blocks are parts of, it is (d_out, d_in)."""

    def __init__(self, setup: Setup, node: Node) -> None:
        self.setup, self.node = setup, node
        self.module = setup.network.map_of(node)
        self.own_rows = setup.own_rows(node)
        self.taps = self.module.weights[0].shape[2:].numel()
        self.d_in, self.d_out = self.module.inputs.width * self.taps, self.module.outputs.width

    @property
    def name(self) -> str:
        """The module path."""
        return self.node.path

    @property
    def device(self) -> torch.device:
        return self.module.weights[0].device

    @property
    def norm(self) -> Node | None:
        """The batch norm that alone reads it."""
        return self.setup.norms.get(self.node.name)

    @property
    def folded(self) -> bool:
        """Whether it is fitted to what the batch norm behind it gives."""
        return self.node.name in self.setup.folded

    @property
    def intercept(self) -> bool:
        """Whether the architecture has a place for one: a bias, or the batch norm behind."""
        return self.module.bias is not None or self.norm is not None

    @property
    def fitted(self) -> Tensor:
        """Outputs that are no copies of a source's: bool (d_out,)."""
        return ~self.setup.exact[self.node.name].to(self.device)

    def row_sets(self, block: Block) -> list[Tensor]:
        """Rows of a block to be solved together: those that are no copies, one network's head at a time."""
        rows = torch.arange(block.start, block.stop)
        rows = rows[~self.setup.exact[self.node.name][rows]]
        if self.own_rows and len(rows):
            owner = self.module.outputs.owner[rows]
            return [rows[owner == m] for m in owner.unique()]
        return [rows] if len(rows) else []

    def columns(self, block: Block) -> Tensor:
        """Inputs of the matrix that a block reads."""
        return tap_columns(block.columns.to(self.device), self.taps)

    # -- sizes and memory ---------------------------------------------------------------------------------------

    @property
    def block_sizes(self) -> list[tuple[int, int]]:
        """Columns and rows of each block."""
        return [(len(b.columns) * self.taps, b.stop - b.start) for b in self.module.blocks]

    @property
    def entries(self) -> tuple[int, int]:
        """How many numbers an image's inputs hold, and its outputs, in the merged network."""
        return self.setup.network.entries(self.node.inputs[0]), self.setup.network.entries(self.node.name)

    @property
    def places(self) -> int:
        """Rows of one image: places of its output."""
        return self.entries[1] // self.d_out

    @property
    def kernel(self) -> tuple[int, ...]:
        """(kh, kw) of a convolution, () of a Linear."""
        return kernel_of(self.module.weights[0])

    @property
    def map_size(self) -> tuple[int, ...]:
        """(h, w) of a convolution's inputs."""
        return tuple(self.setup.network.trace.shapes[self.node.inputs[0]][2:])

    @cached_property
    def maps(self) -> Plan | None:
        """How sums over its rows are made without them, where that is faster: when all positions are used."""
        setup = self.setup
        if self.node.operation != "conv2d" or self.node.grouped or setup.positions < 1 or not setup.one_size:
            return None
        found = plan(self.node, self.kernel, self.map_size)
        return found if worthwhile(found, self.module.inputs.width) else None

    @property
    def images_by_row(self) -> int:
        """How many images are made into rows of inputs at a time."""
        return max(1, ROW_ENTRIES // (self.places * self.d_in))

    def few_rows(self, images: int) -> int | None:
        """How many rows so many images give, when the layer is better solved on them than on sums of their products."""
        count = images * self.places
        return count if self.setup.one_size and 2 * count <= self.d_in else None

    def batch_bytes(self, batch: int) -> tuple[int, int]:
        """What the inputs and targets of a batch take while they are assembled, and then."""
        shapes = self.setup.network.trace.shapes
        own_z, own_y = (shapes[name].numel() for name in (self.node.inputs[0], self.node.name))
        z, y = self.entries
        kept = 0 if self.setup.fit.inputs == "merged" else z
        seen = 2 + (len(self.setup.sources) if self.folded else 0)
        assembling = kept + max(2 * own_z if kept else 0, y + seen * own_y)
        each = batch * self.module.weights[0].element_size()
        return each * assembling, each * (kept + y)

    def rows_bytes(self, batch: int) -> int:
        """What the inputs and targets of a batch take, assembled and then row by row."""
        z, y = self.entries
        assembling, assembled = self.batch_bytes(batch)
        copies = 1 if self.node.operation == "linear" else 2  # what is seen row by row, and that shifted
        by_row = copies * (self.places * self.d_in + y) + (z if self.taps > 1 else 0)
        at_a_time = min(batch, self.images_by_row)
        return max(assembling, assembled + at_a_time * by_row * self.module.weights[0].element_size())

    def maps_bytes(self, batch: int, targets: bool = True) -> int:
        """What they take, assembled and then summed as maps."""
        assembling, assembled = self.batch_bytes(batch)
        d_out, itemsize = self.d_out if targets else 0, self.module.weights[0].element_size()
        adding = MapSums.add_bytes(self.maps, self.module.inputs.width, d_out, batch, itemsize)
        return max(assembling, assembled + adding)
