"""Views, reshapes, permutations and the like as one: dimensions cut into factors, put in order, joined again."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.core.tracing.one_by_one import INPUT


@dataclass
class Factors:
    """The factors of a value's dimensions, outermost first, by number, and how a later value is made of them.

    sizes {factor: extent}. inputs: factors of each dimension of the value; outputs: of each dimension of what follows.
    """

    sizes: dict[int, int]
    inputs: list[list[int]]
    outputs: list[list[int]]
    numbers: Any = field(default_factory=itertools.count)

    @staticmethod
    def of(shape: Sequence[int]) -> "Factors":
        numbers = itertools.count()
        made = [next(numbers) for _ in shape]
        return Factors(dict(zip(made, shape, strict=True)), [[n] for n in made], [[n] for n in made], numbers)

    def copy(self) -> "Factors":
        high = max(self.sizes, default=-1) + 1
        return Factors(
            dict(self.sizes),
            [list(o) for o in self.inputs],
            [list(o) for o in self.outputs],
            itertools.count(high),
        )

    def permute(self, dims: Sequence[int]) -> None:
        self.outputs = [self.outputs[d] for d in dims]

    def reshape(self, shape: Sequence[int]) -> bool:
        """Give the outputs another shape; False where that cuts a factor in a way that is no product."""
        line = [n for own in self.outputs for n in own]
        outputs: list[list[int]] = []
        for at, size in enumerate(shape):
            own, left = [], size
            if size == 1 and line and self.sizes[line[0]] == 1:
                own.append(line.pop(0))
            while left > 1:
                while line and self.sizes[line[0]] == 1:
                    own.append(line.pop(0))
                if not line:
                    return False
                factor = line.pop(0)
                extent = self.sizes[factor]
                if left % extent == 0:
                    own.append(factor)
                    left //= extent
                elif extent % left == 0:
                    outer, inner = self._cut(factor, left)
                    line.insert(0, inner)
                    own.append(outer)
                    left = 1
                else:
                    return False
            if at == len(shape) - 1:
                own += line
                line = []
            outputs.append(own)
        if line:
            if not outputs or any(self.sizes[n] != 1 for n in line):
                return False
            outputs[-1] += line
        self.outputs = self._one_kept(outputs)
        return True

    def _one_kept(self, outputs: list[list[int]]) -> list[list[int]]:
        """A single channel ahead of places, (n, 1, h, w), that a new last dimension of one entry behind them can be."""
        ahead = self.outputs[1] if len(self.outputs) > 2 else []
        alone = len(ahead) == 1 and self.sizes[ahead[0]] == 1 and len(outputs) == 3 and not outputs[2]
        if not alone or ahead[0] not in outputs[1] or len(outputs[1]) < 2:
            return outputs
        return [outputs[0], [n for n in outputs[1] if n != ahead[0]], ahead]

    def _cut(self, factor: int, size: int) -> tuple[int, int]:
        outer, inner = next(self.numbers), next(self.numbers)
        self.sizes[outer], self.sizes[inner] = size, self.sizes.pop(factor) // size
        for own in itertools.chain(self.inputs, self.outputs):
            if factor in own:
                at = own.index(factor)
                own[at : at + 1] = [outer, inner]
        return outer, inner

    def plain(self) -> bool:
        """Whether nothing is moved at all."""
        return self.inputs == self.outputs

    def attributes(self) -> dict[str, Any]:
        """As a node has it: images are a factor of one, whose extent is what the value gives."""
        number = {n: i for i, n in enumerate(n for own in self.inputs for n in own)}
        return {
            "atoms": [[_one(self.sizes[n]) for n in own] for own in self.inputs],
            "free": [
                next((i for i, n in enumerate(own) if self.sizes[n] % INPUT == 0), None)
                for own in self.inputs
            ],
            "order": [number[n] for own in self.outputs for n in own],
            "groups": [len(own) for own in self.outputs],
        }


def _one(size: int) -> int:
    return size // INPUT if size % INPUT == 0 else size
