"""YAML is read as DVC reads it, and what is no YAML is told of in one line."""

import pytest
from ruamel.yaml import YAML

from stages.core.runtime.errors import LONGEST, InputError
from stages.core.settings.params import load_params, profiles_by_file
from stages.core.settings.yaml_text import in_one_line, parse_yaml, read_yaml

SCALARS = (
    "010", "1_0", "1:30", "1e0", "1e3", "-1e-3", "yes", "no", "on", "off", "y", "n", "0x10", "0o10", "1.e3",
    ".5", "+.5", "1_0.0", "+1", "-0", "00", "~", "Null", "TRUE", "False", "1e", "1.", ".inf", "-.INF", ".nan",
    "012345678", "_1", "0x", "1e+5", "1.5e-3", "text", "1-2", "2:00", "=x",
)  # fmt: skip


@pytest.mark.parametrize("scalar", SCALARS)
def test_a_value_is_the_one_that_dvc_reads(scalar):
    found, expected = parse_yaml(f"a: {scalar}", "text")["a"], YAML(typ="safe").load(f"a: {scalar}")["a"]
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    "text", [*SCALARS, "", " a", "a: b", "- a", "#a", "a, b", "[a", "é", "it's", '"', "1.5", "!a", "&a"]
)
def test_a_text_that_is_written_is_read_as_that_text(text):
    for value in (text, [text], {text: text}):
        line = f"a: {in_one_line(value)}"
        assert parse_yaml(line, "text")["a"] == YAML(typ="safe").load(line)["a"] == value


@pytest.mark.parametrize("name", ["params.yaml", "published.yaml", "dvc.yaml"])
def test_the_files_of_the_project_are_the_same_for_both(name, request):
    path = request.config.rootpath / name
    assert read_yaml(path) == YAML(typ="safe").load(path.read_text())


BROKEN = {
    "latin-1": (b"# a\nb: caf\xe9\n", "line 2: found the byte 0xe9; allowed: text in UTF-8"),
    "utf-16": ("a: 1".encode("utf-16"), "line 1: found the byte 0xff"),
    "a key twice": (b"a: 1\nb: {c: 1, c: 2}\n", "line 2: .*'c' is there twice"),
    "a tab": (b"a:\n\tb: 1\n", "line 2: not a YAML file"),
    "two documents": (b"a: 1\n---\na: 2\n", "line 2: not a YAML file"),
    "a zero": (b"a: 1\0", "not a YAML file"),
    "a program": (b"a: !!python/object/apply:os.system [ls]", "line 1: not a YAML file"),
    "thousands of digits": (b"a: " + b"9" * 5000, "not a YAML file"),
    "depth": (b"[" * 5000, "not a YAML file"),
    "nothing": (b"", "found None; allowed: a mapping of settings"),
    "a list": (b"- 1\n", "found .1.; allowed: a mapping"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_yaml_is_told_of_in_one_line(what, tmp_path):
    content, message = BROKEN[what]
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= LONGEST


def test_a_file_that_starts_with_a_mark_of_its_encoding_is_read(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1, "b": 2}


def test_a_folder_in_its_place_is_told_of(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read .Is a directory"):
        read_yaml(tmp_path)


@pytest.mark.parametrize("content", ["", "- a", "a: 1", "profiles: [1]", "profiles:", "profiles: {a: 1}",
                                     "profiles: {a: {labels: shared, tasks: {}, colour: 1}}"])  # fmt: skip
def test_published_profiles_that_are_none_are_told_of(content, tmp_path, request):
    text = (request.config.rootpath / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(
        text.replace("profiles_from: params.yaml", "profiles_from: published.yaml")
    )
    (tmp_path / "published.yaml").write_text(content)
    with pytest.raises(InputError, match="profiles"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(InputError, match=r"published\.yaml: profiles"):
        profiles_by_file(tmp_path)
