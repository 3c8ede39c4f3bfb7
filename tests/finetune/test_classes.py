"""Classes of tasks that share their labels are compared by name where the data are read, before any training."""

import io
import zipfile
from types import SimpleNamespace

import pytest
from PIL import Image

from stages.core.runtime.errors import InputError
from stages.core.settings.profiles import Data
from stages.finetune import __main__ as stage


def profile(tmp_path, monkeypatch, labels, **classes):
    """A profile whose tasks' data sets have these class folders."""
    monkeypatch.setattr(stage, "DATA", tmp_path)
    content = io.BytesIO()
    Image.new("L", (8, 8), 3).save(content, "PNG")
    tasks = {}
    for name, own in classes.items():
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as file:
            for part in ("train", "test"):
                for label in own:
                    for i in range(4):
                        file.writestr(f"{part}/{label}/{i}.png", content.getvalue())
        tasks[name] = SimpleNamespace(data=Data(kind="folder", key=f"{name}.zip", size=8))
    return SimpleNamespace(labels=labels, tasks=tasks)


def test_another_class_is_named_with_both_tasks(tmp_path, monkeypatch):
    made = profile(tmp_path, monkeypatch, "shared", a=["cat", "dog", "owl"], b=["cat", "doe", "owl"])
    with pytest.raises(InputError, match="task b: its class 'doe' is 'dog' in task a"):
        stage.classes_of(made)


def test_a_class_too_many_is_named(tmp_path, monkeypatch):
    made = profile(tmp_path, monkeypatch, "shared", a=["cat", "dog"], b=["cat", "dog", "owl"])
    with pytest.raises(InputError, match="task b: its class 'owl' is None in task a"):
        stage.classes_of(made)


def test_separate_labels_may_differ(tmp_path, monkeypatch):
    made = profile(tmp_path, monkeypatch, "separate", a=["cat", "dog"], b=["ant", "bee", "cow"])
    assert stage.classes_of(made) == {"a": ("cat", "dog"), "b": ("ant", "bee", "cow")}
