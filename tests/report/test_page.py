"""The page of HTML: whole, without any other file or request, readable by a browser and by who cannot see it."""

import json
import re
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from stages.core.settings.params import load_params
from stages.report.__main__ import main
from stages.report.page import ALTERNATIVES, CAPTIONS

CHROMIUM = Path("/usr/bin/chromium")
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """What is in the page, and whether every tag that is opened is closed, in turn."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.rows, self.tables = [], [], [], {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables[dict(attrs)["id"]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(make_reports):
    """The text of the page of a run with two networks at budget 1.46."""

    def make(**settings) -> str:
        reports = make_reports(**{"budget": 1.46, **settings})
        main()
        return (reports / "index.html").read_text()

    return make


@pytest.fixture
def of_experiments(folders):
    main("--experiments", *map(str, folders))
    return Path("reports/experiments/index.html").read_text()


def test_the_table_is_that_of_the_report(page):
    found = Page(page()).tables["results"]
    rows = [line for line in Path("reports/table.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in rows]
    assert found == [cells[0], *cells[2:]]


def test_widths_residuals_and_hashes_are_there(page):
    found = Page(page()).tables
    assert found["widths"][0] == ["group", "one source", "identity", "weights", "activations"]
    groups = {line[0]: line[1:] for line in found["widths"][1:]}
    rows = Path("reports/allocate/activations.csv").read_text().splitlines()[1:]
    for group, units, shared, separate, _ in (row.split(",") for row in rows):
        assert groups[group][0] == units
        assert groups[group][-1] == str(int(shared) + 2 * int(separate))
    assert found["residuals"][0] == ["layer", "pleas", "pleas_adam", "progressive"]
    assert len(found["residuals"]) == 8
    hashes = dict(found["hashes"][1:])
    for row in ("pleas", "oracle"):
        assert hashes.items() >= json.loads(Path(f"reports/probe/{row}.json").read_text())["sha256"].items()


@pytest.mark.parametrize("which", ["page", "of_experiments"])
def test_it_needs_nothing_else(which, request):
    text = request.getfixturevalue(which)
    text = text() if callable(text) else text
    found = Page(text)
    for tag, attributes in found.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    assert not re.search(r"url\(|@import|https?://|//cdn|fetch\(|XMLHttpRequest|import\(", text)
    policy = [
        own["content"] for own in found.of("meta") if own.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy[0].startswith("default-src 'none'")
    assert len(text) < 2_000_000


@pytest.mark.parametrize("which", ["page", "of_experiments"])
def test_it_can_be_read_without_seeing_it(which, request):
    text = request.getfixturevalue(which)
    found = Page(text() if callable(text) else text)
    headings = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert found.of("html") == [{"lang": "en"}]
    assert all(len(own["alt"]) > 20 and int(own["width"]) > 100 for own in found.of("img"))
    assert all(own.get("scope") in ("col", "row") for own in found.of("th"))
    assert len(found.of("caption")) == len(found.of("table"))


def test_colours_have_contrast(page):
    text = page()
    schemes = re.findall(r":root \{(.*?)\}", text, re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colour = {name: luminance(value) for name, value in re.findall(r"--(\w+): #(\w+)", scheme)}
        for front in ("text", "soft", "link"):
            for back in ("page", "card") if front != "text" else ("page", "card", "mark"):
                bright, dark = sorted([colour[front], colour[back]], reverse=True)
                assert (bright + 0.05) / (dark + 0.05) > 4.5, (front, back)  # WCAG 2.2, AA


def luminance(value: str) -> float:
    value = "".join(digit * 2 for digit in value) if len(value) == 3 else value
    parts = [int(value[index : index + 2], 16) / 255 for index in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("profile", "task"), [("digits", ""), ("digits_split", ', task="low"')])
def test_the_lines_that_load_the_best_network_are_python(page, profile, task):
    code = re.search(r"<h2>Load.*?<pre><code>(.*?)</code>", page(profile=profile), re.S)[1]
    code = code.replace("&#34;", '"')
    compile(code, "page", "exec")
    assert 'load_merged("models/recalibrate/progressive.safetensors")' in code
    assert f"std.view(1, -1, 1, 1){task})" in code
    data = next(iter(load_params().profiles[profile].tasks.values())).data
    assert f"torch.rand(8, {data.channels}, {data.size}, {data.size})" in code


def test_names_cannot_put_markup_into_the_page(page):
    text = page(groups=["<script>alert(1)</script>", "b"])
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_a_warning_is_on_the_page(page, make_reports):
    assert 'class="warning"' not in page()
    path = Path("reports/probe/oracle.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"at_chance": ["rotated"]}))
    main()
    assert "<strong>Warning</strong>: task rotated" in Path("reports/index.html").read_text()


def test_experiments_have_a_row_for_each_profile_budget_and_method(of_experiments):
    found = Page(of_experiments)
    header, *rows = found.tables["results"]
    assert header[:4] == ["method", "profile", "budget", "accuracy"]
    assert len(rows) == len({tuple(row[:3]) for row in rows}) == 2 * 2 * 7
    (row,) = [row for row in rows if row[:3] == ["pleas", "digits", "1.5"]]
    assert (row[3], row[-1]) == ("56.0 ± 1.4", "2")
    assert [own["data-column"] for own in found.of("select")] == ["1", "0", "2"]


PROBE = """<script>
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("#results tbody tr")];
  const column = index => rows().map(row => row.cells[index].textContent);
  const headings = [...document.querySelectorAll("#results thead th")];
  const at = headings.findIndex(own => ["average", "accuracy"].includes(own.textContent));
  const found = {errors: window.errors, width: innerWidth, content: document.documentElement.scrollWidth};
  headings[at].firstElementChild.click(); found.falling = column(at); found.sort = headings[at].ariaSort;
  headings[at].firstElementChild.click(); found.rising = column(at);
  headings[0].firstElementChild.click(); found.names = column(0);
  found.pictures = [...document.images].map(own => [own.naturalWidth, own.clientWidth]);
  for (const own of document.querySelectorAll("select")) {
    own.value = own.options[1].value; own.dispatchEvent(new Event("change"));
  }
  found.shown = rows().filter(row => !row.hidden).length;
  found.requests = performance.getEntriesByType("resource").map(own => own.name).filter(n => !n.startsWith("data:"));
  document.body.innerHTML = ""; document.body.append(JSON.stringify(found));
});
</script></body>"""
ERRORS = "<head><script>window.errors = []; addEventListener('error', e => errors.push(e.message)); " \
         "addEventListener('securitypolicyviolation', e => errors.push(e.violatedDirective));</script>"  # fmt: skip


def browse(text: str, folder: Path, width: int) -> dict:
    """What a browser finds in the page, at a width."""
    path = folder / "probe.html"
    path.write_text(text.replace("<head>", ERRORS, 1).replace("</body>", PROBE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / f'profile-{width}'}",
             f"--window-size={width},900", "--enable-logging=stderr", "--dump-dom"]  # fmt: skip
    run = subprocess.run(
        [CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in run.stderr
    return json.loads(re.search(r"<body>(.*?)</body>", run.stdout, re.S)[1])


@pytest.mark.skipif(not CHROMIUM.exists(), reason="no /usr/bin/chromium: apt-get install chromium")
@pytest.mark.parametrize("which", ["page", "of_experiments"])
def test_in_a_browser_it_sorts_chooses_and_asks_for_nothing(which, request, tmp_path):
    text = request.getfixturevalue(which)
    found = browse(text() if callable(text) else text, tmp_path, 1280)
    assert found["errors"] == found["requests"] == []
    numbers = [float(cell.split()[0]) for cell in found["falling"]]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 3
    assert found["sort"] == "descending"
    assert [float(cell.split()[0]) for cell in found["rising"]] == sorted(numbers)
    assert found["names"] == sorted(found["names"])
    assert found["pictures"]
    assert all(own > 300 and shown > 300 for own, shown in found["pictures"])
    assert found["content"] <= found["width"]  # tables and pictures scroll in themselves
    assert found["shown"] == (1 if which == "of_experiments" else len(numbers))


def test_every_picture_has_a_caption_and_says_what_it_shows():
    assert set(CAPTIONS) == set(ALTERNATIVES)
