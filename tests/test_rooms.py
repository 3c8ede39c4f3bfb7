"""The house: which room of stages/core may use which, and no circle of files anywhere in stages."""

import ast
import re
from pathlib import Path

import pytest

from stages.core.recipe.rooms import ALIGNMENTS, MATCHINGS, RECALIBRATIONS, SOLVERS

ROOT = Path(__file__).parents[1]

# Lower floors first. A room may use those named, and itself.
ROOMS = {
    "runtime": "",
    "settings": "runtime",
    "units": "runtime",
    "images": "settings runtime",
    "networks": "settings runtime",
    "recipe": "settings runtime",
    "graph": "units runtime",
    "sweep": "graph runtime",
    "tracing": "graph units runtime",
    "merged": "graph units runtime",
    "align": "graph units runtime recipe merged tracing",
    "handover": "graph images networks runtime settings sweep tracing units",
}

# Files that are found by their names. The first stage looks at the settings that they declare, all at once.
WAYS = {
    "ALIGNMENTS": ALIGNMENTS, "MATCHINGS": MATCHINGS, "SOLVERS": SOLVERS, "RECALIBRATIONS": RECALIBRATIONS,
}  # fmt: skip
CHECKS = {
    "ALIGNMENTS": "check_match", "MATCHINGS": "check_match", "SOLVERS": "check_fit",
    "RECALIBRATIONS": "check_recalibration",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Names of all modules a file imports, anywhere in it: inside functions and for type checkers too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def asked(path: Path) -> set[str]:
    """Packages whose files a file finds by their names: `SOLVERS.way(name)` and what checks a row of one room."""
    text = path.read_text()
    return {
        package.package
        for name, package in WAYS.items()
        if re.search(rf"\b{name}\.(way|of)\(|\b{CHECKS[name]}\(", text) and path.name != "rooms.py"
    }


def source(module: str, root: Path = ROOT) -> Path | None:
    """The file of a module of ours; None for others, and for names that are no module."""
    path = root.joinpath(*module.split("."))
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)


def arrows(root: Path) -> dict[str, set[str]]:
    """Which files of stages each file imports, relative to the top folder; packages without content left out."""
    found = {}
    for path in sorted((root / "stages").rglob("*.py")):
        others = {source(name, root) for name in imports(path)} - {None, path}
        for package in asked(path):
            others |= set(root.joinpath(*package.split(".")).glob("*.py"))
        found[str(path.relative_to(root))] = {str(o.relative_to(root)) for o in others if o.stat().st_size}
    return found


def wrong_arrows(root: Path) -> list[str]:
    """Imports that the table does not allow."""
    wrong = []
    for file, others in arrows(root).items():
        top, *below = file.removeprefix("stages/").split("/")
        for other in sorted(others):
            stage, *room = other.removeprefix("stages/").split("/")
            if top == "core":
                allowed = stage == "core" and room[0] in (below[0], *ROOMS[below[0]].split())
            else:  # a stage; only the faces (api.py and what a user calls beside the stages) see several
                allowed = stage in ("core", top) or not below
            if not allowed:
                wrong.append(f"{file} imports {other}")
    return wrong


def circles(root: Path) -> list[set[str]]:
    """Sets of files of which each imports, through others, every other."""
    reach = {file: set(others) for file, others in arrows(root).items()}
    for middle in reach:
        for file in reach:
            if middle in reach[file]:
                reach[file] |= reach[middle]
    found = {file: {o for o in reach[file] if file in reach.get(o, ())} for file in reach}
    return [set(own) for own in {frozenset(own) for own in found.values() if own}]


def test_every_room_is_in_the_table():
    found = {path.name for path in (ROOT / "stages/core").iterdir() if (path / "__init__.py").is_file()}
    assert found == set(ROOMS)
    assert [path.name for path in (ROOT / "stages/core").glob("*.py")] == ["__init__.py"]


def test_the_table_has_no_circle():
    done: set[str] = set()
    for room, used in ROOMS.items():
        assert {*used.split()} <= done | {"merged", "tracing", "recipe"}, room
        done.add(room)


def test_rooms_and_stages_use_what_they_may():
    assert not wrong_arrows(ROOT)


def test_a_way_that_is_found_by_its_name_is_an_arrow():
    found = arrows(ROOT)
    assert "stages/fit/solvers/adam.py" in found["stages/fit/visitor.py"]
    assert "stages/match/ways/dual.py" in found["stages/match/matching.py"]
    assert "stages/core/align/ways/cca.py" in found["stages/core/align/solve.py"]
    assert "stages/recalibrate/ways/tact.py" in found["stages/recalibrate/recalibrate.py"]


@pytest.mark.parametrize("room", WAYS)
def test_every_file_of_a_room_registers_itself(room):
    ways = [WAYS[room].way(name) for name in WAYS[room].names]
    assert [way.name for way in ways] == WAYS[room].names
    assert all(callable(way.make) for way in ways)


def test_no_circle_of_files():
    assert not circles(ROOT)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("stages/core/sweep/gram.py", "from stages.core.merged.network import MergedNetwork"),
        ("stages/core/units/groups.py", "def f():\n    import stages.core.graph.nodes"),
        ("stages/core/runtime/files.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
         "    from stages.core.settings.params import Params"),
        ("stages/match/assign.py", "from stages.allocate import solve"),
        ("stages/core/graph/nodes.py", "from stages.match import assign"),
    ],
)  # fmt: skip
def test_an_arrow_that_is_not_in_the_table_is_found(file, line, copy):
    path = copy / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert any(file in wrong for wrong in wrong_arrows(copy))


def test_a_circle_is_found(copy):
    path = copy / "stages/core/graph/nodes.py"
    path.write_text(f"{path.read_text()}\n\ndef late():\n    from stages.core.graph.trace import lay_out\n")
    assert any("stages/core/graph/nodes.py" in circle for circle in circles(copy))


@pytest.fixture
def copy(tmp_path):
    for path in (ROOT / "stages").rglob("*.py"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    return tmp_path
