import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.runtime.errors import InputError
from stages.core.units.groups import Axis, Inner, PermutationGroup, PermutationSpec, Span, permute
from stages.core.units.matching import (
    Matching,
    UnitSplit,
    check_matching,
    check_splits,
    full_split,
    identity_matching,
    inside_order,
    unit_order,
)

# one tensor whose axis 0 holds two units of a, three blocks of two of b, then an entry of nobody
SPEC = PermutationSpec(
    {
        "a": PermutationGroup("a", 2, (Span(Axis("w", 0)),)),
        "b": PermutationGroup("b", 3, (Span(Axis("w", 0), start=2, block=2), Span(Axis("v", 1)))),
        "images": PermutationGroup("images", 4, (Span(Axis("w", 1)),), fixed=True),
    }
)


def state():
    return {"w": torch.arange(36).view(9, 4), "v": torch.arange(6).view(2, 3), "rest": torch.ones(3)}


def test_a_span_moves_its_own_entries_only():
    moved = permute(state(), SPEC, {"b": torch.tensor([2, 0, 1])})
    assert moved["w"][:, 0].div(4).tolist() == [0, 1, 6, 7, 2, 3, 4, 5, 8]
    assert moved["v"].tolist() == [[2, 0, 1], [5, 3, 4]]
    assert torch.equal(moved["rest"], torch.ones(3))


def test_groups_on_one_axis_are_permuted_apart_and_together_alike():
    a, b = torch.tensor([1, 0]), torch.tensor([1, 2, 0])
    together = permute(state(), SPEC, {"a": a, "b": b})
    apart = permute(permute(state(), SPEC, {"b": b}), SPEC, {"a": a})
    assert all(torch.equal(together[name], apart[name]) for name in together)


@given(order=st.permutations(range(3)))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_the_inverse_order_undoes_a_permutation(order):
    order = torch.tensor(order)
    back = permute(permute(state(), SPEC, {"b": order}), SPEC, {"b": order.argsort()})
    assert all(torch.equal(back[name], tensor) for name, tensor in state().items())


def test_permuting_leaves_the_given_state_alone():
    given_state = state()
    permute(given_state, SPEC, {"a": torch.tensor([1, 0]), "b": torch.tensor([1, 2, 0])})
    assert all(torch.equal(given_state[name], tensor) for name, tensor in state().items())


@given(d=st.integers(1, 20), k=st.integers(0, 20), networks=st.integers(2, 4))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_merged_width_counts_shared_units_once(d, k, networks):
    k = min(k, d)
    split = UnitSplit(tuple(range(k)), tuple(range(k, d)))
    copies = [(unit, None) for unit in split.shared]
    copies += [(unit, m) for unit in split.separate for m in range(networks)]
    assert split.width(networks) == len(copies)
    assert split.fraction == pytest.approx(1 - k / d)
    assert split.size == d


def test_a_full_split_covers_every_unit_of_the_free_groups_once():
    splits = full_split(SPEC, {"a": [], "b": [2, 0]})
    assert splits == {"a": UnitSplit((), (0, 1)), "b": UnitSplit((0, 2), (1,))}
    assert full_split(SPEC)["b"] == UnitSplit((0, 1, 2), ())


def test_the_order_of_a_network_lists_its_partners_of_the_shared_units_first():
    matching = Matching({"b": torch.tensor([[0, 1, 2], [2, 0, 1]])}, {})
    splits = {"b": UnitSplit((1,), (0, 2))}
    assert unit_order(matching, splits, 0)["b"].tolist() == [1, 0, 2]
    assert unit_order(matching, splits, 1)["b"].tolist() == [0, 2, 1]


def test_the_identity_matching_is_accepted():
    check_matching(identity_matching(SPEC, 3), SPEC, 3)


def test_a_matching_that_is_no_permutation_is_refused_by_group_and_network():
    units = dict(identity_matching(SPEC, 3).units)
    for row in ([0, 1, 1], [0, 1], [0, 1, 3]):
        units["b"] = [torch.arange(3), torch.tensor(row), torch.arange(3)]
        with pytest.raises(InputError, match="group b, network 1"):
            check_matching(Matching(units, {}), SPEC, 3)


def test_a_matching_that_moves_the_reference_is_refused():
    units = dict(identity_matching(SPEC, 2).units)
    units["b"] = torch.tensor([[1, 0, 2], [0, 1, 2]])
    with pytest.raises(InputError, match="matching: b, network 0: found another order than its own"):
        check_matching(Matching(units, {}), SPEC, 2)


def test_orders_inside_parts_are_checked():
    spec = PermutationSpec(SPEC.groups, {"c": Inner("c", "a", 2, 3, ())})
    rows = torch.arange(3).repeat(2, 2, 1)
    with_rows = lambda rows: Matching({**identity_matching(spec, 2).units, "c": rows}, {})  # noqa: E731
    check_matching(with_rows(rows), spec, 2)
    wrong = rows.clone()
    wrong[1, 1] = torch.tensor([0, 0, 1])
    for other in (wrong, rows[:1], rows[:, :1], rows[0]):
        with pytest.raises(InputError, match=r"matching: c: .*2 parts a permutation of 3 units"):
            check_matching(with_rows(other), spec, 2)
    wrong = rows.clone()
    wrong[0, 1] = torch.tensor([1, 0, 2])
    with pytest.raises(InputError, match="matching: c, network 0: found another order than its own"):
        check_matching(with_rows(wrong), spec, 2)


def test_the_contents_of_a_group_are_the_units_inside_and_what_lies_on_it_as_a_whole():
    inner = Inner("c", "b", 3, 2, (Span(Axis("w", 0), start=2),))
    spec = PermutationSpec(SPEC.groups, {"c": inner})
    assert spec.contents("a") == (Inner("a", "a", 2, 1, SPEC.groups["a"].spans),)
    assert spec.contents("b") == (inner, Inner("b", "b", 3, 1, (Span(Axis("v", 1)),)))
    assert spec.contents("images") == ()
    assert list(spec.ordered) == ["a", "b"]
    fixed = PermutationSpec(SPEC.groups, {"d": Inner("d", "images", 4, 5, ())})
    assert list(fixed.ordered) == ["a", "b", "images"]


def test_the_order_of_single_units_follows_from_parts_and_inside():
    inner = Inner("c", "a", 2, 3, ())
    units = {
        "a": torch.tensor([[0, 1], [1, 0]]),
        "c": torch.tensor([[[0, 1, 2]] * 2, [[2, 0, 1], [1, 0, 2]]]),
    }
    assert inside_order(units, inner, 1).tolist() == [5, 3, 4, 1, 0, 2]
    assert inside_order({"a": units["a"]}, inner, 1).tolist() == [3, 4, 5, 0, 1, 2]
    assert inside_order({}, inner, 1).tolist() == list(range(6))


def test_a_matching_without_a_group_is_refused():
    units = {"a": torch.arange(2).repeat(2, 1)}
    with pytest.raises(InputError, match="group b is missing"):
        check_matching(Matching(units, {}), SPEC, 2)


def test_a_matching_of_another_number_of_networks_is_refused():
    with pytest.raises(InputError, match="group a has 3 rows; allowed: 2"):
        check_matching(identity_matching(SPEC, 3), SPEC, 2)


def test_splits_that_do_not_cover_every_unit_once_are_refused_by_group():
    splits = full_split(SPEC, {"a": [0], "b": [2]})
    check_splits(splits, SPEC)
    for wrong in (UnitSplit((0, 1), (1, 2)), UnitSplit((0,), (1,)), UnitSplit((0, 1, 2), (3,))):
        with pytest.raises(InputError, match="group b: its lists do not cover its 3 units"):
            check_splits({**splits, "b": wrong}, SPEC)
    with pytest.raises(InputError, match="group b is missing"):
        check_splits({"a": splits["a"]}, SPEC)
