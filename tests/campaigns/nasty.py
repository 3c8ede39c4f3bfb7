"""Values that nobody means, and places in a tree of mappings and lists to put them."""

import copy
import math
from collections.abc import Iterator
from typing import Any

VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**63, 10**30, -(2**40), 0.0, -0.5, 1.5, 1e-300, 1e308,
    math.nan, math.inf, -math.inf, "", " ", "x", "relu", "a\nb", "\x00", "é" * 400, "../../x", "/etc/passwd",
    "os:system", [], [0], [1, 2], [-1] * 5, [[1]], ["x"] * 3, [10**6] * 4, {}, {"x": 1}, {"eps": math.nan}, [None],
    list(range(1000)),
)  # fmt: skip


def places(tree: Any, above: tuple = ()) -> Iterator[tuple]:
    """The paths of everything in a tree, at any depth."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*above, key)
        yield from places(value, (*above, key))


def spoilt(draw: Any, tree: Any) -> Any:
    """A copy with one entry replaced, removed, doubled, or under another name."""
    found = copy.deepcopy(tree)
    *parents, last = draw.choice(list(places(found)))
    place = found
    for key in parents:
        place = place[key]
    match draw.choice(["value", "value", "value", "gone", "twice", "renamed", "negative"]):
        case "gone":
            del place[last]
        case "twice" if isinstance(place, list):
            place.insert(last, copy.deepcopy(place[last]))
        case "renamed" if isinstance(place, dict):
            place[f"{last}{draw.choice(['s', '_', ' ', 'X'])}"] = place.pop(last)
        case "negative" if isinstance(place[last], int | float):
            place[last] = -place[last]
        case _:
            place[last] = copy.deepcopy(draw.choice(VALUES))
    return found
