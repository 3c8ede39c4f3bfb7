"""Names of stages: what is defined is used there, not by tests alone, and one name is one thing."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def trees(root: Path) -> dict[str, ast.Module]:
    return {
        str(path.relative_to(root)): ast.parse(path.read_text())
        for path in sorted((root / "stages").rglob("*.py"))
    }


def used(tree: ast.AST) -> Counter[str]:
    """Names and attributes that are read, and what is imported by name."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # annotations in quotes, __all__
            found[node.value] += 1
    return found


def defined(tree: ast.Module) -> list[tuple[str, ast.stmt]]:
    """Functions, classes and constants of a module, and the methods of its classes."""
    found: list[tuple[str, ast.stmt]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append((node.name, node))
        elif isinstance(node, ast.Assign):
            found += [(target.id, node) for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append((node.target.id, node))
        if isinstance(node, ast.ClassDef):
            found += [
                (own.name, own)
                for own in node.body
                if isinstance(own, ast.FunctionDef) and not own.decorator_list
            ]
    return [(name, node) for name, node in found if not name.startswith("__")]


def names_of_two(root: Path) -> dict[str, list[str]]:
    """Classes, type aliases and constants that several modules define, or one module twice."""
    where: dict[str, list[str]] = {}
    for file, tree in trees(root).items():
        for name, node in defined(tree):
            if node in tree.body and name.lstrip("_")[:1].isupper():
                where.setdefault(name, []).append(file)
    return {name: files for name, files in where.items() if len(files) > 1}


CALLED_BY_OTHERS = {  # methods of interfaces that are not ours, and those for notebooks
    "stages/core/merged/network.py: report",
    "stages/core/settings/yaml_text.py: construct_mapping",
    "stages/core/images/windows.py: readable",
    "stages/core/runtime/progress.py: display",
    "stages/core/images/windows.py: seekable",
    "stages/core/images/windows.py: readinto",
    "stages/core/images/formats/cifar.py: find_class",
}


def unused(root: Path) -> set[str]:
    found = trees(root)
    total = sum(map(used, found.values()), Counter())
    return {
        f"{file}: {name}"
        for file, tree in found.items()
        for name, node in defined(tree)
        if total[name] <= used(node)[name] and not called_by_name(tree, node) and not registered(node)
    }


def called_by_name(tree: ast.Module, node: ast.stmt) -> bool:
    """Whether a method belongs to a class that looks its methods up: getattr(self, f"_{what}")."""
    owner = next((own for own in tree.body if isinstance(own, ast.ClassDef) and node in own.body), None)
    return (
        owner is not None
        and node.name.startswith("_")
        and 'getattr(self, f"_' in ast.unparse(owner).replace("'", '"')
    )


def registered(node: ast.stmt) -> bool:
    """Whether a function is a way of its room, which is found by the name of its file."""
    return ".register(" in "".join(map(ast.unparse, getattr(node, "decorator_list", [])))


def test_everything_that_is_defined_is_used_in_stages():
    assert unused(ROOT) == CALLED_BY_OTHERS


def test_what_only_itself_or_nothing_calls_is_found(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/a.py").write_text(
        "A = 1\n\ndef f(x):\n    return f(x - A)\n\n\ndef g():\n    return C().m()\n\n\n"
        "class C:\n    def m(self):\n        return g\n\n    def n(self):\n        return 1\n"
    )
    assert unused(tmp_path) == {"stages/a.py: f", "stages/a.py: n"}


def test_one_name_is_one_thing():
    assert not names_of_two(ROOT)
    found = {name for tree in trees(ROOT).values() for name, _ in defined(tree)}
    assert {"Task", "Matching", "Source", "Data", "View"} <= found  # and so once each


def test_a_name_of_two_things_is_found(tmp_path):
    (tmp_path / "stages/core").mkdir(parents=True)
    (tmp_path / "stages/a.py").write_text("class Task:\n    A = 1\n\nCHUNK = 2\nlog = None\nOne = int\n")
    (tmp_path / "stages/core/b.py").write_text("Task = dict[str, int]\nCHUNK: int = 3\nlog = None\nA = 4\n")
    assert names_of_two(tmp_path) == {name: ["stages/a.py", "stages/core/b.py"] for name in ("Task", "CHUNK")}
