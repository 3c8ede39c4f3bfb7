"""params.yaml with one or more of its values replaced, removed, doubled or renamed.

Good: refused in one line, or accepted; in two seconds.
"""

import copy
import functools
import random
from pathlib import Path
from typing import Any

import yaml

from stages.artifacts.settings import outputs
from stages.core.networks.architectures import check_architecture
from stages.core.recipe.recipe import load_recipe
from stages.core.settings.params import parse_params
from tests.campaigns.nasty import VALUES, spoilt
from tests.campaigns.rule import held


@functools.cache
def given() -> Any:
    return yaml.safe_load(Path("params.yaml").read_text())


def trial(draw: random.Random, folder: Path) -> str:
    """One case; what became of it."""
    found = copy.deepcopy(given())
    if draw.random() < 0.3:  # what a run looks at
        active = found["profiles"][found["profile"]]
        found["profiles"][found["profile"]] = spoilt(draw, active)
    for _ in range(draw.choice([1, 1, 1, 3])):
        found = spoilt(draw, found)
    if draw.random() < 0.01:
        found = draw.choice(VALUES)
    return held(lambda: _load(found))[0]


def _load(found: Any) -> None:
    params = parse_params(found)
    load_recipe(params)
    outputs(params.active)
    for name in params.active.tasks:
        architecture = params.active.architecture_of(name)
        check_architecture(architecture.name, architecture.arguments)
