"""torch.einsum in its spellings: what is read computes what torch does, with every group permuted."""

import pytest
import torch
from torch import nn

from stages.core.runtime.errors import InputError
from stages.core.tracing.einsum import spelled_out
from stages.core.tracing.trace import trace
from stages.core.tracing.verify import verify

SPELLINGS = {  # a value (images n, 4 places t, 6 units c), a parameter's shape, and what makes (n, t, units) of it
    "n t c, c d -> n t d": ((6, 5), 5, lambda y: y),
    "ntc,dc->ntd": ((5, 6), 5, lambda y: y),
    "...c,cd": ((6, 5), 5, lambda y: y),
    "ntc,tc->ntc": ((4, 6), 6, lambda y: y),
    "ntc,c->nct": ((6,), 6, lambda y: y.mT),
    "...tc,t->...tc": ((4,), 6, lambda y: y),
    "st,ntc->nsc": ((5, 4), 6, lambda y: y),
}


class Spelled(nn.Module):
    def __init__(self, equation):
        super().__init__()
        shape, width, self.tail = SPELLINGS[equation]
        self.equation, self.first = equation, not equation.startswith(("n", "..."))
        self.stem, self.weight, self.fc = (
            nn.Conv1d(3, 6, 1),
            nn.Parameter(torch.randn(shape)),
            nn.Linear(width, 3),
        )

    def forward(self, x):
        x = self.stem(x).relu().transpose(1, 2)
        both = (self.weight, x) if self.first else (x, self.weight)
        return self.fc(self.tail(torch.einsum(self.equation, *both)).cos()).mean(1)


@pytest.mark.parametrize("equation", SPELLINGS)
def test_a_parameter_is_a_linear_map_or_a_scale(equation):
    torch.manual_seed(0)
    network, x = Spelled(equation).double(), torch.randn(3, 3, 4).double()
    traced = trace(network, x)
    verify(network, traced, x)
    made = "d" in equation  # new units beside the six
    assert len(traced.spec.free) == 1 + made


class Both(nn.Module):
    """Two values; letters of one side, of both, summed over: several or none of each."""

    def __init__(self, equation):
        super().__init__()
        self.equation = equation
        self.q, self.k, self.v = (nn.Conv2d(3, 12, 1) for _ in range(3))
        self.fc = nn.Conv2d(12, 3, 1)

    def forward(self, x):
        q, k, v = (own(x).unflatten(1, (2, 6)) for own in (self.q, self.k, self.v))
        scores = torch.einsum(self.equation, q, k)
        n, h = scores.shape[:2]
        y = torch.einsum("nhxykl,nhdkl->nhdxy", scores.flatten(4).softmax(-1).view(n, h, 4, 4, 4, 4), v)
        return self.fc(y.flatten(1, 2)).mean((2, 3))


@pytest.mark.parametrize("equation", ["nhdxy,nhdkl->nhxykl", "...dxy,...dkl->...xykl"])
def test_several_letters_are_one_dimension(equation):
    torch.manual_seed(0)
    network, x = Both(equation).double(), torch.randn(2, 3, 4, 4).double()
    traced = trace(network, x)
    verify(network, traced, x)
    assert {group.size for group in traced.spec.free.values()} == {2}


@pytest.mark.parametrize(
    ("equation", "ranks", "wanted"),
    [
        ("ij,jk", (2, 2), (["ij", "jk"], "ik")),
        ("ba,ca", (2, 2), (["ba", "ca"], "bc")),
        ("...i,i", (3, 1), (["abi", "i"], "ab")),
        ("...ij,...jk->...ik", (3, 4), (["bij", "abjk"], "abik")),
    ],
)
def test_what_is_not_written_is_torchs(equation, ranks, wanted):
    assert spelled_out(equation, ranks) == wanted
    sizes = dict(zip("abcijk", (2, 3, 4, 5, 6, 7), strict=True))
    values = [torch.randn([sizes[c] for c in t]).double() for t in wanted[0]]
    whole = f"{','.join(wanted[0])}->{wanted[1]}"
    torch.testing.assert_close(torch.einsum(equation, *values), torch.einsum(whole, *values))


@pytest.mark.parametrize(
    ("equation", "shape", "words"),
    [("ntc,c->n", (6,), "no rule for einsum ntc,c->n"), ("ntc,tcd->ntd", (4, 6, 5), "a table over units")],
)
def test_what_is_neither_is_refused(equation, shape, words, monkeypatch):
    monkeypatch.setitem(
        SPELLINGS, equation, (shape, 5, lambda y: y if y.dim() == 3 else y[:, None, None].expand(-1, 1, 5))
    )
    with pytest.raises(InputError, match=words):
        trace(Spelled(equation), torch.randn(2, 3, 4))
