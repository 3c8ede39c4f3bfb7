"""The notebook face: networks, images and settings that nobody means, alone and together.

Good: refused in one line, or a network with finite weights; the networks that were given are as before.
"""

import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages import merge
from tests.campaigns.nasty import VALUES
from tests.campaigns.rule import Bad, held


class Plain(nn.Module):
    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.fc(torch.relu(self.second(x)).mean((2, 3)))


class Failing(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("of the user's own\nin two lines")


class Twice(Plain):
    def forward(self, x: torch.Tensor) -> Any:
        return (super().forward(x), x)


class Flat(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4 * 36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.first(x)).flatten(1))


def _filled(value: float, where: str = "second.weight") -> nn.Module:
    network = Plain()
    with torch.no_grad():
        network.state_dict()[where].flatten()[:2] = value
    return network


NETWORKS = (
    Plain, Plain, Plain, Failing, Twice, Flat, lambda: Plain(5), lambda: Plain(4, 4), lambda: Plain().double(),
    lambda: Plain().half(), lambda: Plain().to("meta"), lambda: _filled(math.nan), lambda: _filled(math.inf),
    lambda: _filled(1e30), lambda: _filled(-1.0, "norm.running_var"), lambda: nn.Sequential(), nn.Identity,
    lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), lambda: Plain().state_dict(),
    lambda: torch.jit.script(Plain()),
    lambda: nn.DataParallel(Plain()), lambda: nn.Linear(6, 3),
)  # fmt: skip
IMAGES = (
    lambda: [torch.randn(6, 1, 6, 6)], lambda: [torch.randn(6, 1, 6, 6)], lambda: torch.randn(6, 1, 6, 6),
    lambda: [(torch.randn(6, 1, 6, 6), torch.zeros(6))], lambda: [(torch.zeros(6), torch.randn(6, 1, 6, 6))],
    lambda: [torch.randn(6, 3, 6, 6)], lambda: [torch.randn(6, 6)], lambda: [torch.randn(6, 1, 6, 6, 6)],
    lambda: [torch.zeros(6, 1, 6, 6)], lambda: [torch.full((6, 1, 6, 6), math.nan)],
    lambda: [torch.randn(6, 1, 6, 6) * 1e30], lambda: [torch.randn(6, 1, 6, 6) * 1e38],
    lambda: [torch.randn(6, 1, 6, 6).half()], lambda: [torch.randn(6, 1, 6, 6) + 0j],
    lambda: [torch.zeros(6, 1, 6, 6).bool()], lambda: [torch.zeros(6, 1, 6, 6).long()],
    lambda: [torch.randn(1, 1, 6, 6)],
    lambda: [torch.randn(6, 1, 6, 6), torch.randn(6, 1, 9, 9)], lambda: [torch.randn(0, 1, 6, 6)], list,
    lambda: (torch.randn(1, 1, 6, 6) for _ in range(3)), lambda: list(torch.randn(6, 1, 6, 6)),
    lambda: [{"x": torch.randn(6, 1, 6, 6)}],
    lambda: torch.utils.data.TensorDataset(torch.randn(6, 1, 6, 6)), lambda: [torch.randn(6, 1, 6, 6).to_sparse()],
)  # fmt: skip
SETTINGS = ("budget", "method", "labels", "classes", "options")
PARTS = ("match", "fit", "recalibrate", "data")
OPTIONS = ("images", "seed", "ridge", "positions", "storage", "memory", "allocate")
METHODS = ("average", "pleas", "progressive", "regmean", "zipit", "tact", "git_rebasin")


def trial(draw: random.Random, folder: Path) -> str:
    """One case; what became of it."""
    torch.manual_seed(draw.randrange(2**31))
    networks: Any = {"a": Plain(), "b": (draw.choice(NETWORKS) if draw.random() < 0.4 else Plain)()}
    batches: Any = {"a": draw.choice(IMAGES)(), "b": draw.choice(IMAGES)()} if draw.random() < 0.4 else {
        "a": [torch.randn(6, 1, 6, 6)], "b": [torch.randn(6, 1, 6, 6)]}  # fmt: skip
    settings: dict[str, Any] = {"method": draw.choice(METHODS)}
    match draw.choice(["none", "none", "any", "part", "option"]):
        case "any":
            settings[draw.choice(SETTINGS)] = draw.choice(VALUES)
        case "part":
            settings["method"] = {draw.choice(PARTS): draw.choice(VALUES)}
        case "option":
            settings["options"] = {draw.choice(OPTIONS): draw.choice(VALUES)}
    if draw.random() < 0.1:
        networks = draw.choice([*VALUES, list(networks.values()), {"a": networks["a"]}])
    if draw.random() < 0.1:
        batches = draw.choice([*VALUES, {"a": batches["a"]}, list(batches.values())])
    before = _weights(networks)
    outcome, merged = held(lambda: merge(networks, batches, progress=False, **settings))
    if not all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, _weights(networks), strict=True)):
        raise Bad("the networks were changed")
    if outcome == "read" and not all(bool(t.isfinite().all()) for t in merged.state_dict().values()):
        raise Bad("weights that are not finite")
    return outcome


def _weights(networks: Any) -> list[torch.Tensor]:
    held_by = networks.values() if isinstance(networks, dict) else []
    return [t.clone() for n in held_by if isinstance(n, nn.Module) for t in n.state_dict().values()
            if not t.is_meta and not isinstance(t, nn.parameter.UninitializedTensorMixin)]  # fmt: skip
