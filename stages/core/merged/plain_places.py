"""Where the layers and tensors of a plain network are: under the sources' module paths, equal ones once."""

import torch.fx
from torch import Tensor, nn

from stages.core.runtime.errors import InputError


class Places:
    """Modules and tensors below ``root``."""

    def __init__(self) -> None:
        self.root = nn.Module()
        self._made: dict[str, nn.Module | Tensor] = {}  # path: what is there

    def put(self, path: str, item: nn.Module | Tensor) -> str:
        """Put a layer or a tensor under a path, or use an equal one that is there; the path, numbered if taken.

        Raises InputError for a path that torch.fx keeps for itself.
        """
        wanted, number = path, 0
        while path in self._made or self._occupied(path):
            if path in self._made and _equal(self._made[path], item):
                return path
            number += 1
            path = f"{wanted}_{number}"
        self._made[path] = item
        module, (*parents, last) = self.root, path.split(".")
        if (parents or [last])[0] in dir(torch.fx.GraphModule):
            raise InputError(f"{path}: a name that torch.fx has itself; allowed: another name of the module")
        for part in parents:
            if not hasattr(module, part):
                setattr(module, part, nn.Module())
            module = getattr(module, part)
        if isinstance(item, nn.Module | nn.Parameter):
            setattr(module, last, item)
        else:
            module.register_buffer(last, item)
        return path

    def _occupied(self, path: str) -> bool:
        """Whether tensors lie below the path, or it lies below a layer, or every module has something of that name."""
        return hasattr(nn.Module, path.rpartition(".")[2]) or any(
            own.startswith(f"{path}.") or (path.startswith(f"{own}.") and isinstance(item, Tensor))
            for own, item in self._made.items()
        )


def _equal(one: nn.Module | Tensor, two: nn.Module | Tensor) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    if isinstance(one, nn.Module) and isinstance(two, nn.Module) and repr(one) == repr(two):
        own, other = one.state_dict(), two.state_dict()
        return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    return False
