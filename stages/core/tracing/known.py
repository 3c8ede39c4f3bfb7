"""Networks like one that was read before are not exported again.

Two modules of one type, printed alike and with tensors of the same shapes, mostly have one forward. Whether they do is
seen: on perturbed weights, in float64, the graph must compute what the module does.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from stages.core.tracing.export import unwrap
from stages.core.tracing.reading import Reading, read
from stages.core.tracing.verify import computes

_READ: OrderedDict[tuple, Reading] = OrderedDict()
MOST_KNOWN = 16


def read_known(module: nn.Module, example: Tensor) -> Reading:
    """As ``read``, from memory where the same graph serves."""
    inner = unwrap(module)
    shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in inner.state_dict().items())
    key = (type(inner), str(inner), shapes, tuple(example.shape[1:]), example.dtype)
    found = _READ.get(key)
    if found is None or not _serves(found, inner, example):
        found = read(inner, example)
    _READ[key] = found
    _READ.move_to_end(key)
    while len(_READ) > MOST_KNOWN:
        _READ.popitem(last=False)
    return found


def _serves(reading: Reading, module: nn.Module, example: Tensor) -> bool:
    with torch.no_grad():
        return computes(module, reading, example[:2].cpu())
