"""docs/adding_methods.md, followed as it stands: shell blocks are run, lines of YAML go into their sections."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/adding_methods.md"


def follow(folder: Path, run: Callable[[str], None]) -> None:
    """Do in a copy of the project what the page says. run: called with each shell block."""
    for language, block in re.findall(r"```(bash|yaml)\n(.*?)```", PAGE.read_text(), re.S):
        if language == "bash":
            run(block)
        else:
            add_lines(folder / "params.yaml", block)


def add_lines(path: Path, block: str) -> None:
    """Put lines below the top-level keys that stand above them."""
    text = path.read_text()
    for section, lines in re.findall(r"^(\w+:)\n((?: .*\n)+)", block, re.M):
        found, count = re.subn(rf"^{section}\n", lambda match: match.group() + lines, text, flags=re.M)  # noqa: B023
        assert count == 1, section
        text = found
    path.write_text(text)


def shell(folder: Path) -> Callable[[str], None]:
    """Run a block in a folder, without the pipeline."""

    def run(block: str) -> None:
        assert "sed " not in block
        if block.strip() != "dvc repro":
            subprocess.run(["bash", "-ec", block], cwd=folder, check=True)

    return run
