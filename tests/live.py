"""What is held in memory while something runs, to the byte."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside held at once, whoever holds them."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.total = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages(args)}
        for storage in storages(out):
            if storage._cdata not in given:  # else a view of something that was there, perhaps a weight
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.total += storage.nbytes()
        if self.total > self.peak:  # at most: what was freed since is still in it
            self.peak = max(self.peak, self.now())
        return out

    def now(self):
        self.held = {key: ref for key, ref in self.held.items() if not ref[0].expired()}
        self.total = sum(nbytes for _, nbytes in self.held.values())
        return self.total


def storages(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
