"""Gram matrices of many rows: summed in float64, some rows of the matrix at a time, each product taken once."""

from collections.abc import Iterator

from torch import Tensor

# Rows of a matrix that are worked on at a time, so that what is worked with stays small beside it.
BLOCK = 512


def blocks(d: int) -> list[slice]:
    """Rows of a (d, d) matrix, ``BLOCK`` at a time."""
    return [slice(start, min(start + BLOCK, d)) for start in range(0, d, BLOCK)]


def restricted(G: Tensor, columns: Tensor) -> Tensor:
    """G of some inputs, a copy: without the intermediate of all their rows that double indexing makes."""
    own = G.new_empty(len(columns), len(columns))
    for block in blocks(len(columns)):
        own[block] = restricted_rows(G, columns, block)
    return own


def restricted_rows(G: Tensor, columns: Tensor, block: slice) -> Tensor:
    """Some rows of the same."""
    return G[columns[block]].index_select(1, columns)


def add_gram(G: Tensor, z: Tensor, weight: float) -> None:
    """Add weight * z^T z to G, (d, d) float64: on and below the blocks of its diagonal, which is half the work."""
    for block in blocks(len(G)):
        G[block, : block.stop] += (z[:, block].T @ z[:, : block.stop]).double().mul_(weight)


def gram(z: Tensor) -> Tensor:
    """z^T z of float64 rows z (rows, d): (d, d)."""
    G = z.new_zeros(z.shape[1], z.shape[1])
    add_gram(G, z, 1.0)
    complete_gram(G)
    return G


def gram_bytes(d: int) -> int:
    """Memory of what ``add_gram`` works with: one block of rows in float64, made from one in a shorter type."""
    return 12 * min(BLOCK, d) * d


def complete_gram(G: Tensor) -> None:
    """Fill in the half that ``add_gram`` leaves out."""
    for block in blocks(len(G)):
        G[: block.start, block] = G[block, : block.start].T


def add_pairs(G: Tensor, z: Tensor, networks: int) -> None:
    """Add to G, (d, d) float64, of z^T z what pairs columns of different networks, side by side in z, and the diagonal.

    Below the diagonal; ``complete_pairs`` fills in the rest.
    """
    G.diagonal().add_(z.square().sum(0).double())
    for block, before in _pairs(len(G), networks):
        G[block, before] += (z[:, block].T @ z[:, before]).double()


def complete_pairs(G: Tensor, networks: int) -> None:
    """Fill in the half that ``add_pairs`` leaves out; between a network's own units, G stays zero."""
    for block, before in _pairs(len(G), networks):
        G[before, block] = G[block, before].T


def _pairs(d: int, networks: int) -> Iterator[tuple[slice, slice]]:
    """Rows of the matrix, ``BLOCK`` at a time, and the columns of the networks before."""
    size = d // networks
    for start in range(size, d, size):
        for block in blocks(size):
            yield slice(start + block.start, start + block.stop), slice(0, start)
