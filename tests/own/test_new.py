"""`python -m stages.new` as a user calls it: what it finds, tries, refuses and writes."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from stages import new
from stages.core.runtime.errors import InputError
from stages.core.settings.params import load_params
from stages.own.folder import look

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the project's params.yaml, entered; nobody is at a terminal."""
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    return tmp_path


def flags(own, **changes):
    given = {"first": own / "first.pth", "second": own / "second.pth"} | changes
    words = [f"--checkpoint={name}={path}" for name, path in given.items()]
    return [*words, *(f"--images={name}={own / name}" for name in given)]


def test_a_whole_profile_is_written_and_nothing_else_changed(project, own, capsys):
    before = (project / "params.yaml").read_text()
    new.main("my_pair", *flags(own), "--mean", "0.8", "--std", "0.1")
    after = (project / "params.yaml").read_text()
    assert after.startswith(before)
    params = load_params(project / "params.yaml")
    profile = params.profiles["my_pair"]
    assert profile.architecture.model_dump() == {
        "name": "resnet", "arguments": {"depth": 8, "width": 4, "channels": 3, "classes": 4},
    }  # fmt: skip
    assert profile.labels == "separate"
    assert [profile.architecture_of(name).arguments["classes"] for name in profile.tasks] == [4, 3]
    data = profile.tasks["second"].data
    assert (data.key, data.size, data.mean, data.std) == (f"{own}/second.zip", 12, [0.8], [0.1])
    assert profile.finetune.epochs == 0
    text = capsys.readouterr().out
    assert "found     resnet (depth 8, width 4, channels 3, classes 4)\n" in text
    assert "3 classes, 9 BatchNorm2d" in text
    assert (
        "4 classes (first 0, first 1, first 2, first 3), 64 train and 32 test images, all of 12x12 pixels"
        in text
    )
    assert re.search(r"right on (9\d|100)\.\d % of 32 test images; guessing gives 25.0 %", text)
    assert "WARNING" not in text
    assert text.endswith("run       dvc exp run -S profile=my_pair -S '~methods.pleas_adam'\n")


def test_files_that_are_not_read_are_said(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    assert look(tmp_path).described().endswith("all of 8x8 pixels")
    for name in ("train/a/.DS_Store", "train/a/5.HEIC", "test/b/Thumbs.db"):
        (tmp_path / name).write_bytes(b"something")
    said = look(tmp_path).described()
    assert said.endswith(
        "pixels; passed over 2 files, not .jpg .jpeg .png .bmp .webp .gif in train/ or test/: test/b/Thumbs.db, "
        "train/a/5.HEIC"
    )


def test_what_comes_behind_the_profiles_stays_behind_them(project, own):
    path = project / "params.yaml"
    text = path.read_text()
    top, profiles = text.split("\n# A merging problem each.")
    path.write_text(f"# A merging problem each.{profiles}\n# the rest\n\n{top}")
    new.main("my_pair", *flags(own), "--mean", "0.8", "--std", "0.1")
    after = path.read_text()
    assert after.index("my_pair:") < after.index("# the rest")
    without = re.sub(r"\n  my_pair:.*?epochs: 0}\n", "", after, flags=re.S)
    assert without == f"# A merging problem each.{profiles}\n# the rest\n\n{top}"
    assert "my_pair" in load_params(path).profiles


def test_a_profile_is_put_into_the_users_own_file_as_it_is(project, own):
    """Line ends, indentation, a mark of the encoding, a link, the mode: all but the profile stays."""
    path, real = project / "params.yaml", project / "real.yaml"
    top, profiles = path.read_text().split("\nprofiles:\n")
    profiles = "".join(f"  {line}" if line.startswith(" ") else line for line in profiles.splitlines(True))
    before = ("\ufeff" + f"{top}  # mine: é\nprofiles:\n{profiles}# end".replace("\n", "\r\n")).encode()
    path.unlink()
    real.write_bytes(before)
    real.chmod(0o600)
    path.symlink_to("real.yaml")
    new.main("my_pair", *flags(own), "--mean", "0.8", "--std", "0.1")
    assert path.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    after = real.read_bytes()
    start, end = after.index(b"\r\n    my_pair:"), after.index(b"# end")
    assert after[:start] + after[end:] == before
    assert after.count(b"\n") == after.count(b"\r\n")
    assert "my_pair" in load_params(path).profiles


def test_a_file_that_may_only_be_read_is_left_alone(project, own):
    path = project / "params.yaml"
    path.chmod(0o444)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"params.yaml: may only be read; allowed: .* chmod u\+w"):
        new.main("my_pair", *flags(own), "--mean", "0.8", "--std", "0.1")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["null", "true", "1e3", "010", "0x1f", "7", "inf", "NaN", "a b", "a.b", "x" * 101, "_a", ""]
)
def test_a_name_that_dvc_would_read_as_something_else_is_refused(name, project, own):
    with pytest.raises(InputError, match=r"new: found the name .*; allowed: "):
        new.main(name, *flags(own))
    with pytest.raises(InputError, match=r"new: (found the name|--checkpoint: found) .*; allowed: "):
        new.main("my_pair", *flags(own, **{name: own / "first.pth"}))


def test_a_folder_without_an_end_is_refused(project, own, tmp_path):
    for what, make in {
        "neither a file nor a folder": os.mkfifo,
        "a link to a folder that contains it": lambda path: path.symlink_to(".."),
    }.items():
        shutil.copytree(own / "first", tmp_path / "odd")
        make(tmp_path / "odd/train/first 0/odd.png")
        with pytest.raises(InputError, match=what):
            new.main(
                "my_pair",
                *flags(own)[:2],
                f"--images=first={tmp_path / 'odd'}",
                f"--images=second={own / 'second'}",
            )
        shutil.rmtree(tmp_path / "odd")


def test_of_the_usual_ways_to_preprocess_the_one_that_suits_is_taken(project, own, capsys):
    new.main("my_pair", *flags(own))
    text = capsys.readouterr().out
    assert text.count("the best of 4 ways on labelled train images") == 2
    assert "not known how the images were scaled in training" in text
    data = load_params().profiles["my_pair"].tasks["first"].data
    assert data.mean != [0.5]


def test_a_source_that_only_guesses_is_a_warning(project, own, capsys):
    new.main("my_pair", *flags(own), "--mean", "-90", "--std", "0.001")
    assert "WARNING: task first: its source network is right on" in capsys.readouterr().out


def test_files_below_data_own_are_named_by_key(project, own, capsys):
    shutil.copytree(own, project / "data/own")
    new.main("my_pair", *flags(project / "data/own"), "--mean", "0.8", "--std", "0.1")
    profile = load_params().profiles["my_pair"]
    assert profile.tasks["first"].checkpoint == "first.pth"
    assert profile.tasks["first"].data.key == "first.zip"
    assert capsys.readouterr().out.endswith(
        "dvc exp run -S profile=my_pair -S source=local -S '~methods.pleas_adam'\n"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["digits"], "profile 'digits' is in params.yaml already"),
        (["--images=third=x"], "--images: found third, first, second; allowed: the tasks first, second"),
        (
            ["--checkpoint=first=x"],
            "--checkpoint: found .*; allowed: NAME=PATH, as first=a.pth, each name once",
        ),
        (["--mean", "0.5"], "found one of --mean and --std"),
        (["--network", "resnet18"], "nearest is resnet18, which differs"),
        (["--network", "nowhere:build"], "cannot be imported .*installed or in this folder"),
        (["--size", "4"], "new: size: found 4"),
        (
            ["--argument", "depth=20"],
            r"found resnet .depth=8, .* for --argument depth=20; allowed: what the file says",
        ),
        (["--argument", "colour=1"], r"found resnet .* for --argument colour=1"),
        (["--argument", "depth=["], r"--argument depth: line 2: not a YAML file"),
        (["my pair"], "found the name 'my pair'; allowed: letters"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_nothing_is_written(project, own, change, message):
    before = (project / "params.yaml").read_bytes()
    name = change.pop(0) if not change[0].startswith("-") else "my_pair"
    with pytest.raises(InputError, match=message) as error:
        new.main(
            name, *change, *flags(own), *([] if "--mean" in change else ["--mean", "0.8", "--std", "0.1"])
        )
    assert "\n" not in str(error.value)
    assert (project / "params.yaml").read_bytes() == before


@pytest.mark.usefixtures("project")
def test_a_folder_of_other_classes_than_the_head_has_is_refused(own):
    words = [
        word.replace(f"{own}/first", f"{own}/second") if "images=first" in word else word
        for word in flags(own)
    ]
    with pytest.raises(InputError, match=r"task first: .* has 4 outputs, .*second 3 class folders"):
        new.main("my_pair", *words)


@pytest.mark.usefixtures("project")
def test_another_architecture_is_refused(own, tmp_path):
    state = torch.load(own / "second.pth")["model"]
    state["bn1.weight"] = torch.full((4,), torch.nan)
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(InputError, match="NaN or infinite values"):
        new.main("my_pair", *flags(own, second=tmp_path / "broken.pth"))


@pytest.mark.usefixtures("project")
def test_what_is_missing_is_said_where_nobody_can_be_asked():
    with pytest.raises(InputError, match="new: --checkpoint: missing; allowed: --checkpoint NAME=PATH"):
        new.main("my_pair")


def test_only_what_is_missing_is_asked_for_on_a_terminal(project, own, monkeypatch):
    asked, answers = [], [f"second={own / 'second.pth'}", "", str(own / "second")]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answers.pop(0))
    given = [f"--images=first={own / 'first'}", "--mean", "0.8", "--std", "0.1"]
    answers.insert(0, f"first={own / 'first.pth'}")
    new.main("my_pair", *given)
    assert asked == [
        "--checkpoint NAME=PATH ", "--checkpoint NAME=PATH ", "--checkpoint NAME=PATH (nothing: no more) ",
        "--images second= ",
    ]  # fmt: skip
    written = yaml.safe_load((project / "params.yaml").read_text())["profiles"]["my_pair"]
    assert list(written["tasks"]) == ["first", "second"]


@pytest.mark.parametrize("words", [[], ["my_pair", "a.pth"], ["my_pair", "--size", "large"]])
def test_words_that_it_cannot_read_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as ended:
        new.main(*words)
    line = capsys.readouterr().err
    assert (ended.value.code, line.count("\n")) == (2, 1)
    assert line.startswith("error: new: ")
