"""Linear maps between merged values, in blocks.

A linear map has one block of rows per column set: rows of shared units read everything, rows of a network's separate
units read that network's view only. The blocks between different networks' separate units do not exist. A dense map
is one block: every row reads everything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.core.graph.nodes import Node, oriented
from stages.core.merged.arrangement import Arrangement, Piece, held_pieces, pieces_of
from stages.core.runtime.errors import InputError


@dataclass(frozen=True)
class Block:
    """Rows ``start:stop`` of a merged linear map read the input entries ``columns`` (ascending).

    owner: the network of the rows, -1 for shared, None where rows of several read the same columns.
    """

    start: int
    stop: int
    columns: Tensor
    owner: int | None


def blocks_of(inputs: Arrangement, outputs: Arrangement, dense: bool = False) -> list[Block]:
    """The blocks of a linear map, rows in the order of the merged output."""
    everything = torch.arange(inputs.width)
    if dense:
        return [Block(0, outputs.width, everything, None)]
    blocks: list[Block] = []
    for piece in pieces_of(outputs):
        columns = everything if piece.owner < 0 else inputs.view(piece.owner)
        previous = blocks[-1] if blocks else None
        if previous is not None and torch.equal(previous.columns, columns):
            blocks[-1] = Block(previous.start, piece.stop, columns, None)
        else:
            blocks.append(Block(piece.start, piece.stop, columns, piece.owner))
    return blocks


class BlockMap(nn.Module):
    """A Linear or a convolution with real blocks. ``weights[i]``: (rows, columns, *kernel) of block i."""

    def __init__(
        self,
        node: Node,
        inputs: Arrangement,
        outputs: Arrangement,
        kernel: Sequence[int],
        bias: bool,
        dense: bool = False,
        held: tuple[Sequence[Piece], Sequence[Piece]] | None = None,
    ) -> None:
        """All weights zero. held: the pieces in which the input and the output are held, by default ``held_pieces``."""
        super().__init__()
        self.node, self.inputs, self.outputs = node, inputs, outputs
        self.blocks = blocks_of(inputs, outputs, dense)
        self._held = held or (held_pieces(inputs), held_pieces(outputs))
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.zeros(b.stop - b.start, len(b.columns), *kernel)) for b in self.blocks]
        )
        self.bias = nn.Parameter(torch.zeros(outputs.width)) if bias else None
        self.at_once, self._made = False, None
        self._slices = [_as_slice(block.columns, inputs.width) for block in self.blocks]
        self._plan = list(self._planned())
        for i, (block, found) in enumerate(zip(self.blocks, self._slices, strict=True)):
            self.register_buffer(f"columns{i}", block.columns if found is None else None, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def dense_weight(self) -> Tensor:
        """(rows, columns, *kernel) with zeros where there is no block, a copy."""
        shape = self.outputs.width, self.inputs.width, *self.weights[0].shape[2:]
        dense = self.weights[0].new_zeros(shape)
        for block, weight in zip(self.blocks, self.weights, strict=True):
            dense[block.start : block.stop, block.columns.to(dense.device)] = weight.detach()
        return dense

    def whole(self) -> Tensor | None:
        """The dense weight of a layer that is run ``at_once`` (tuning), made anew when a block has changed.

        None where blocks run: also wherever gradients are taken, which are those of the blocks.
        """
        if not self.at_once or torch.is_grad_enabled():
            return None
        state = [(w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in self.weights]
        if self._made is None or self._made[0] != state:
            self._made = state, self.dense_weight()
        return self._made[1]

    def forward(self, x: Tensor) -> Tensor:
        """All rows, from a whole value."""
        dim = x.dim() - 1 if self.node.operation == "linear" else 1
        self._check([x], dim)
        if (whole := self.whole()) is not None:
            return self._map(x, whole, self.bias)
        outputs = []
        for i, block in enumerate(self.blocks):
            bias = None if self.bias is None else self.bias[block.start : block.stop]
            outputs.append(self._map(self._read(x, i, dim), self.weights[i], bias))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim)

    def on_pieces(self, pieces: Sequence[Tensor], owner: int | None = None) -> list[Tensor]:
        """The same from a value in the pieces it is held in, to such pieces; ``owner``: one network's rows alone."""
        dim = pieces[0].dim() - 1 if self.node.operation == "linear" else 1
        self._check(pieces, dim)
        if owner is None and (whole := self.whole()) is not None:
            x = _side_by_side(pieces, range(len(pieces)), dim)
            sizes = [piece.stop - piece.start for piece in self._held[1]]
            return list(self._map(x, whole, self.bias).split(sizes, dim))
        outputs = []
        for piece, rows in self._plan:
            if owner not in (None, piece.owner):
                continue
            mapped = []
            for i, start, stop, needed in rows:
                x = self._read(pieces[0], i, dim) if len(pieces) == 1 else _side_by_side(pieces, needed, dim)
                first = self.blocks[i].start
                bias = None if self.bias is None else self.bias[start:stop]
                mapped.append(self._map(x, self.weights[i][start - first : stop - first], bias))
            outputs.append(mapped[0] if len(mapped) == 1 else torch.cat(mapped, dim))
        return outputs

    def _check(self, pieces: Sequence[Tensor], dim: int) -> None:
        """What is too much would not be read, and nobody would see it."""
        found = sum(piece.shape[dim] for piece in pieces)
        if found != self.inputs.width:
            raise InputError(
                f"{self.node.name}: found {found} features; allowed: {self.inputs.width}, as of inputs of "
                "the size that the sources take"
            )

    def _planned(self) -> Iterator[tuple["Piece", list[tuple[int, int, int, tuple[int, ...]]]]]:
        """For each piece of the output: (block, first row, last row + 1, pieces of the input that it reads)."""
        held, written = self._held
        for piece in written:
            rows = []
            for i, block in enumerate(self.blocks):
                start, stop = max(block.start, piece.start), min(block.stop, piece.stop)
                if start < stop:
                    read = tuple(j for j, p in enumerate(held) if bool((block.columns == p.start).any()))
                    rows.append((i, start, stop, read))
            yield piece, rows

    def _read(self, x: Tensor, i: int, dim: int) -> Tensor:
        found = self._slices[i]
        if found is None:
            return x.index_select(dim, getattr(self, f"columns{i}"))
        return x if found == (0, x.shape[dim]) else x.narrow(dim, *found)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.node.operation == "linear":
            return F.linear(x, weight, bias)
        if self.node.operation == "conv2d":
            return F.conv2d(x, weight, bias, **self.node.attributes)
        return getattr(F, self.node.operation)(x, oriented(self.node, weight), bias, **self.node.attributes)


def _side_by_side(pieces: Sequence[Tensor], needed: Sequence[int], dim: int) -> Tensor:
    return pieces[needed[0]] if len(needed) == 1 else torch.cat([pieces[j] for j in needed], dim)


def _as_slice(columns: Tensor, width: int) -> tuple[int, int] | None:
    """(start, length) when the columns are contiguous."""
    if len(columns) == 0:
        return (0, 0)
    start, stop = int(columns[0]), int(columns[-1]) + 1
    return (start, stop - start) if stop - start == len(columns) else None
