"""Checkpoints: damaged files of every format, and files that hold what no network holds.

Good: refused in one line, or finite weights of the network's shapes; of a format with checksums, the saved ones.
"""

import functools
import io
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from stages.core.networks.architectures import build
from stages.core.networks.checkpoints import load_network
from stages.core.runtime.files import write_tensors
from stages.core.settings.profiles import Architecture
from tests.campaigns.nasty import VALUES, spoilt
from tests.campaigns.rule import Bad, damaged, held

ARCHITECTURE = Architecture(name="resnet", arguments={"depth": 8, "width": 2, "channels": 1, "classes": 3})


@functools.cache
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(build(ARCHITECTURE.name, ARCHITECTURE.arguments).state_dict())


@functools.cache
def content(kind: str, folder: Path) -> bytes:
    """The bytes of a sound file."""
    if kind == "safetensors":
        write_tensors(folder / "sound", state())
        return (folder / "sound").read_bytes()
    file = io.BytesIO()
    torch.save(state(), file, _use_new_zipfile_serialization=kind == "zip")
    return file.getvalue()


def trial(draw: random.Random, folder: Path) -> str:
    """One case; what became of it."""
    kind, path = (
        draw.choice(["zip", "zip", "legacy", "safetensors", "strange", "strange"]),
        folder / "case.pth",
    )
    if kind == "strange":
        torch.save(_strange(draw), path, _use_new_zipfile_serialization=draw.random() < 0.8)
    else:
        path.write_bytes(damaged(draw, content(kind, folder)))
    outcome, network = held(lambda: load_network(ARCHITECTURE, path))
    if outcome == "refused":
        return outcome
    found = network.state_dict()
    if not all(bool(t.isfinite().all()) for t in found.values()):
        raise Bad("weights that are not finite")
    same = all(torch.equal(found[name], tensor) for name, tensor in state().items())
    if kind == "zip" and not same:
        raise Bad("damaged, and read as other weights")
    return "read" if same or kind == "strange" else "read as other numbers, which the format cannot tell"


CHANGES = (
    lambda t: t.to(torch.complex64), lambda t: t.bool(), lambda t: t.half(), lambda t: t.double() * 1e300,
    lambda t: t.to(torch.float8_e4m3fn), lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: t * float("inf"),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), lambda t: t.flatten(), lambda t: t[None],
    lambda t: t.long(), lambda t: -t.abs() - 1, lambda t: torch.nn.Parameter(t.float()), lambda t: [t], lambda t: None,
    lambda t: t.to(torch.bfloat16), lambda t: t.expand(2, *t.shape), lambda t: "text", lambda t: 3,
)  # fmt: skip


def _strange(draw: random.Random) -> Any:
    found: Any = OrderedDict((k, t.clone()) for k, t in state().items())
    for _ in range(draw.choice([0, 1, 1, 3])):
        name = draw.choice(list(found))
        found[name] = draw.choice(CHANGES)(
            found[name].float() if found[name].dtype == torch.int64 else found[name]
        )
        if not isinstance(found[name], torch.Tensor):
            break
    match draw.choice(["", "", "names", "prefix", "inside", "beside", "spoilt", "else"]):
        case "names":
            found[draw.choice([3, (1, 2), None, "a\nb", ""])] = torch.zeros(2)
        case "prefix":
            found = {f"{draw.choice(['module.', '_orig_mod.', 'x.'])}{k}": t for k, t in found.items()}
        case "inside":
            for _ in range(draw.choice([1, 2, 5])):
                found = {draw.choice(["state_dict", "model", "ema", "x"]): found}
        case "beside":
            found = {"model": found, "epoch": draw.choice(VALUES), "optimizer": {"state": [torch.zeros(3)]}}
        case "spoilt":
            found = spoilt(draw, {"model": {"a": 1}, "epoch": 3, "list": [1]})
        case "else":
            found = draw.choice([*VALUES, torch.zeros(3), [torch.zeros(3)], (found,)])
    return found
