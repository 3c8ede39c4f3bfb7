"""Sums that every rank took of its own images, as one (stages.core.runtime.ranks)."""

from torch import Tensor

from stages.core.runtime import ranks

Means = tuple[Tensor, Tensor] | None


def pool_sums(
    weight: float, G: Tensor, C: Tensor | None, yy: Tensor | None, means: Means
) -> tuple[float, Means]:
    """Make sums over each rank's rows those over all rows, in place, of use to rank 0 alone.

    G: (..., d_in, d_in), C: (..., d_in, d_out), yy: (..., d_out), about each rank's own means of z and y, or about
    zero where ``means`` is None; float64. Returns the sum of weights and the means of all (Chan, Golub, LeVeque 1983:
    sum_r G_r + w_r (m_r - m) (m_r - m)^T).
    """
    if ranks.count() == 1:
        return weight, means
    total = G.new_tensor(weight)
    ranks.add_up(total)
    if means is not None:
        middle = tuple(own.double() * (weight / total) for own in means)
        ranks.add_up(*middle)
        z, y = (own - all_ for own, all_ in zip(means, middle, strict=True))
        _add_outer(G, z, z, weight)
        if C is not None:
            _add_outer(C, z, y, weight)
            yy += weight * y.square()
        means = middle
    ranks.to_first(G, *([] if C is None else [C, yy]))
    return float(total), means


def pool_moments(count: float, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all ranks; squares: sums about each rank's own ``mean``; float64 (width,) each."""
    total = mean.new_tensor(count)
    ranks.add_up(total)
    middle = mean * (count / total)
    ranks.add_up(middle)
    squares = squares + count * (mean - middle).square()
    ranks.add_up(squares)
    return middle, squares / total


def _add_outer(sums: Tensor, left: Tensor, right: Tensor, weight: float) -> None:
    if sums.dim() == 2:
        sums.addr_(left, right, alpha=weight)
    else:
        sums.add_(left[..., :, None] * right[..., None, :], alpha=weight)
