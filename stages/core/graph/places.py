"""Where the calls of a graph are in the user's code, for the line that refuses one."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stages.core.graph.nodes import Node
from stages.core.runtime.errors import InputError

REFUSED = "another way to write it, or a rule of your own (docs/adding.md)"


@dataclass(frozen=True)
class CodePlace:
    """path: of the module. line: ` at net.py:12 (code)`, or empty where it is not known."""

    path: str
    line: str = ""

    def refusal(self, found: str, allowed: str = REFUSED) -> InputError:
        return InputError(f"{self.path}: {found}{self.line}; allowed: {allowed}")


PlaceOf = Callable[[str], CodePlace | None]  # of a node, by its name


def nowhere(_: str) -> None:
    """Of a graph from a file."""


@contextlib.contextmanager
def placed(node: Node, place_of: PlaceOf) -> Iterator[None]:
    """What is refused inside says the operation, the module's path and the user's line in the place of a name."""
    try:
        yield
    except InputError as error:
        place = place_of(node.name)
        if place is None:
            raise
        found, _, allowed = str(error).removeprefix(f"{node.name}: ").partition("; allowed: ")
        operation = "" if node.operation in found else f"{node.operation}: "
        line = str(place.refusal(f"{operation}{found}", allowed or REFUSED))
        raise type(error)(line) from error  # of its own kind: some are answered
