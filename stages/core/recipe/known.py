"""The full list of methods, where there is no params.yaml: in a notebook, in any folder."""

from functools import cache
from pathlib import Path

from stages.core.recipe.methods import MatchSettings, Method
from stages.core.settings.sections import Name, Section
from stages.core.settings.yaml_text import read_yaml

FILE = Path(__file__).with_name("known.yaml")  # `match` and `full` of params.yaml; a test keeps them equal


class Known(Section):
    """Matchings and methods by name."""

    match: dict[Name, MatchSettings]
    methods: dict[Name, Method]


@cache
def known_methods() -> Known:
    """Every row of the full list, and the matchings they use."""
    found = read_yaml(FILE)
    return Known(match=found["match"], methods=found["full"])
