"""Units that stay inside parts: heads of an attention, groups of a convolution or of a norm."""

import itertools

import hypothesis
import pytest
import torch
from families import FAMILIES, spread
from hypothesis import given
from hypothesis import strategies as st

from stages.api import merge
from stages.core.handover.pairing import load_pairing, save_matching
from stages.core.recipe.methods import MatchSettings
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import write_json
from stages.core.sweep.batches import images_to_batches
from stages.core.tracing.trace import trace
from stages.core.units.groups import permute
from stages.core.units.matching import Matching, check_matching, full_split, unit_order
from stages.core.units.moments import pool
from stages.match.assign import assign_inside, assign_parts
from stages.match.matching import make_matching
from stages.match.turns import Kernel, solve_pairs, take_turns
from stages.match.weights import STATISTICS, match_weights
from stages.statistics.moments import gather

STRUCTURED = ["resnext", "grouped", "group norm", "written attention", "vit"]


@pytest.fixture(params=STRUCTURED)
def family(request, randomise):
    """(seed -> a random network), and the size of its images."""
    make, side = FAMILIES[request.param]
    return lambda seed: spread(randomise(make(), seed), seed), side


def pictures(n, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, side, side, dtype=torch.float64, generator=generator)


def orders(spec, units, network):
    return unit_order(Matching(units, {}), full_split(spec), network, spec)


def objective(spec, states, units):
    """Inner products of all pairs of aligned networks, over the weights that hold units."""
    held = [*spec.free.values(), *spec.inner.values()]
    counted = {span.axis.parameter for own in held for span in own.spans}
    counted |= {name for inner in spec.inner.values() for name in inner.inside}
    aligned = [permute(state, spec, orders(spec, units, m)) for m, state in enumerate(states)]
    return sum(
        float((a[name] * b[name]).sum())
        for a, b in itertools.combinations(aligned, 2)
        for name in counted
        if not name.endswith(STATISTICS)
    )


def search(networks, x, seed=0):
    spec, states = trace(networks[0], x).spec, [network.state_dict() for network in networks]
    return spec, states, *match_weights(spec, states, torch.Generator().manual_seed(seed))


@given(
    parts=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 2), min_size=1, max_size=2),
    seed=st.integers(0, 999),
)
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
def test_the_assignment_over_parts_and_inside_them_is_the_best_of_all(parts, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    gains = [torch.randn(parts * size, parts * size, generator=generator).double() for size in sizes]

    def worth(order, insides):
        return sum(
            float(gain[a * size + c, order[a] * size + inside[a][c]])
            for gain, size, inside in zip(gains, sizes, insides, strict=True)
            for a in range(parts)
            for c in range(size)
        )

    inside = [list(itertools.product(itertools.permutations(range(size)), repeat=parts)) for size in sizes]
    every = itertools.product(itertools.permutations(range(parts)), itertools.product(*inside))
    order, found = assign_parts({str(i): gain for i, gain in enumerate(gains)}, parts)
    reached = worth(order.tolist(), [found[str(i)].tolist() for i in range(len(sizes))])
    assert reached == pytest.approx(max(worth(*one) for one in every))


@pytest.mark.parametrize("networks", [2, 3])
def test_no_sweep_lowers_the_objective(family, networks):
    make, side = family
    x = pictures(2, side)
    for seed in range(2):
        made = [make(10 * seed + m) for m in range(networks)]
        spec, states, units, values = search(made, x, seed)
        assert all(after >= before - 1e-10 * abs(before) for before, after in itertools.pairwise(values))
        assert values[-1] == pytest.approx(objective(spec, states, units))
        assert set(units) == {*spec.free, *spec.inner}
        check_matching(Matching(units, {}), spec, networks)
        whole = {name: units[name] for name in spec.free}
        assert values[-1] > objective(spec, states, whole)  # the order inside parts is worth something


def test_no_two_units_of_a_part_are_better_exchanged(family):
    make, side = family
    spec, states, units, values = search([make(0), make(1)], pictures(2, side))
    for name, inner in spec.inner.items():
        for part in range(inner.parts):
            for c, d in itertools.combinations(range(inner.size), 2):
                other = {**units, name: units[name].clone()}
                other[name][1, part, [c, d]] = units[name][1, part, [d, c]]
                assert objective(spec, states, other) <= values[-1] + 1e-9 * abs(values[-1])


@pytest.mark.parametrize("networks", [2, 3])
def test_permuted_copies_are_recovered_by_weights(family, copies, networks):
    make, side = family
    for seed in range(2):
        made, expected = copies(make(seed), pictures(2, side), networks, seed)
        _, _, units, _ = search(made, pictures(2, side), seed)
        assert units.keys() == expected.units.keys()
        assert all(torch.equal(units[name], own) for name, own in expected.units.items())


@pytest.mark.parametrize("by", ["weights", "activations", "correlation", "dual"])
def test_permuted_copies_are_recovered_by_every_way(family, copies, sources, calibrate, by):
    make, side = family
    x = pictures(24, side)
    made, expected = copies(calibrate(make(0), x), x, 3)
    given_sources = sources(made, x)
    statistics = pool(
        gather(given_sources, images_to_batches([x[:8], x[8:16], x[16:]], 8), precision=x.dtype), 3, 3
    )
    way = {"by": "activations", "similarity": "correlation"} if by == "correlation" else {"by": by}
    generator = torch.Generator().manual_seed(0)
    matching, benefits = make_matching(given_sources, MatchSettings(**way), statistics, generator)
    for name, own in expected.units.items():
        assert torch.equal(matching.units[name], own), name
    for name, own in matching.similarity.items():
        torch.testing.assert_close(own, torch.ones_like(own))
        assert benefits[name].max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_a_permuted_copy_merges_to_the_network_itself(family, copies, calibrate, by):
    make, side = family
    x = pictures(24, side)
    made, _ = copies(calibrate(make(0), x), x)
    found = merge(
        dict(zip("ab", made, strict=True)),
        {"a": [x], "b": [x]},
        method={"match": {"by": by}, "fit": {"solver": "average"}},
        progress=False,
    )
    torch.testing.assert_close(found(x), made[0](x), rtol=1e-6, atol=1e-6)


def test_orders_inside_parts_go_through_the_file(tmp_path, monkeypatch, randomise):
    monkeypatch.chdir(tmp_path)
    make, side = FAMILIES["vit"]
    spec, _, units, _ = search([spread(randomise(make(), m), m) for m in (0, 1)], pictures(2, side))
    alike = {name: torch.rand(units[name].shape) for name in spec.free}
    save_matching("given", Matching(units, alike), {name: own[0] for name, own in alike.items()})
    splits = {name: {"shared": list(range(g.size)), "separate": []} for name, g in spec.free.items()}
    write_json("models/allocate/given.json", {"splits": splits, "reached": 1.0, "dense": True})
    found, read, reached, dense = load_pairing("given")
    assert (read, reached, dense) == (full_split(spec), 1.0, True)
    for given_tables, tables in ((units, found.units), (alike, found.similarity)):
        assert tables.keys() == given_tables.keys()
        assert all(torch.equal(tables[name], own) for name, own in given_tables.items())


@pytest.mark.parametrize("by", ["zip", "cca", "transport"])
def test_what_mixes_units_of_parts_is_refused(family, by):
    make, side = family
    x = pictures(8, side)
    with pytest.raises(
        InputError, match=r"works on single units of group .*allowed: a matching that is a permut"
    ):
        merge(
            {"a": make(0), "b": make(1)}, {"a": [x], "b": [x]}, method={"match": {"by": by}}, progress=False
        )


@torch.no_grad()
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_everything_separate_is_exact(family, by):
    make, side = family
    networks, x = {"a": make(0), "b": make(1)}, pictures(8, side)
    settings = {"labels": "separate", "progress": False}
    method = {"match": {"by": by}, "fit": {"solver": "average"}}
    found = merge(networks, {"a": [x], "b": [x]}, 2.0, method, **settings)
    for name, network in networks.items():
        torch.testing.assert_close(found(x, task=name), network(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("across", [True, False])
def test_a_pair_of_parts_ends_the_same_whichever_pairs_are_solved_beside_it(across):
    parts, size = 5, 4
    draw = torch.Generator().manual_seed(3)
    theirs, mine = torch.randn(2, parts, size, size, 9, generator=draw, dtype=torch.float64)
    written = Kernel("rows", "units", theirs, mine)
    read = Kernel("units", "rows" if across else None, theirs.transpose(1, 2), mine.transpose(1, 2))
    gains = {
        what: torch.randn(parts, parts, size, size, generator=draw, dtype=torch.float64)
        for what in ("units", "rows")
    }
    kernels = [(read, written if across else None)]
    orders, worth = solve_pairs(gains, kernels, parts)
    for i, j in itertools.product(range(parts), repeat=2):
        a, b = torch.tensor([i]), torch.tensor([j])
        alone, own = take_turns(gains, kernels, a, b, {w: assign_inside(g[a, b]) for w, g in gains.items()})
        torch.testing.assert_close(worth[i, j], own[0], rtol=1e-12, atol=0)
        assert all(torch.equal(orders[what][i, j], alone[what][0]) for what in gains)
