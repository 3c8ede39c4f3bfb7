"""README.md and docs: short, and what they point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MODULES = re.compile(r"python -m (stages\.\w+)")


def missing_links(page: Path, text: str) -> list[str]:
    """Relative links and pictures of a page that lead nowhere."""
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    return [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not missing_links(page, page.read_text())


def test_a_link_to_nowhere_is_found():
    assert missing_links(ROOT / "README.md", "[a](docs/nothing.md) [b](docs/results.md#x)") == [
        "docs/nothing.md"
    ]


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    linked = set(re.findall(r"\(docs/(\w+\.md)\)", text))
    assert linked == {page.name for page in PAGES} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_modules_that_are_there(page):
    for module in MODULES.findall(page.read_text()):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
