"""What a stage finds in the place of a file that another left: told of in one line, whatever it is."""

import json
import random

import pytest
import torch

from stages.core.handover import networks, pairing, statistics
from stages.core.runtime.errors import LONGEST, InputError
from stages.core.runtime.files import sha256, write_json, write_tensors
from stages.core.settings.params import load_params
from stages.core.units.matching import Matching
from stages.report.tables import read_columns
from tests.campaigns.nasty import VALUES, spoilt

ALLOCATION = {"splits": {"first": {"shared": [0, 1], "separate": [2]}}, "reached": 1.25, "dense": False}
OTHERS = (
    "{}",
    "[]",
    "3",
    "null",
    '{"graph": null}',
    '{"splits": {"first": {"shared": [[1]], "separate": []}}}',
)


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    """A workspace with params.yaml and what match and allocate leave."""
    (tmp_path / "params.yaml").write_text((request.config.rootpath / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    units = {"first": torch.zeros(2, 3).long()}
    found = Matching(units, {"first": torch.zeros(2, 3)})
    pairing.save_matching("way", found, {"first": torch.zeros(3)})
    write_json("models/allocate/way.json", ALLOCATION)
    return tmp_path


def one_line(call, start):
    with pytest.raises(InputError, match=start) as error:
        call()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= LONGEST


@pytest.mark.parametrize("content", OTHERS)
def test_an_allocation_that_is_none_is_told_of(content, folder):
    (folder / "models/allocate/way.json").write_text(content)
    one_line(
        lambda: pairing.load_pairing("way"), r"models/allocate/way.json: not what the stage allocate leaves"
    )


def test_a_spoilt_allocation_is_read_or_told_of(folder):
    draw = random.Random(0)
    for _ in range(300):
        content = draw.choice(VALUES) if draw.random() < 0.1 else spoilt(draw, ALLOCATION)
        (folder / "models/allocate/way.json").write_text(json.dumps(content))
        try:
            _, splits, reached, dense = pairing.load_pairing("way")
        except InputError:
            continue
        assert isinstance(reached, float)
        assert isinstance(dense, bool)
        assert all(type(unit) is int for own in splits.values() for unit in (*own.shared, *own.separate))


def test_the_files_of_another_stage_are_told_of(folder):
    write_tensors("models/match/way.safetensors", {"other": torch.zeros(2)})
    one_line(
        lambda: pairing.load_pairing("way"), r"models/match/way.safetensors: not what the stage match leaves"
    )
    one_line(lambda: pairing.load_benefits("way", ["first"]), "not what the stage match leaves .KeyError")
    write_tensors(statistics.MOMENTS, {"other": torch.zeros(2)})
    one_line(lambda: statistics.load_statistics(load_params(), "own"), "not what the stage statistics leaves")


@pytest.mark.parametrize("content", OTHERS)
def test_a_description_that_is_none_is_told_of(content, folder):
    write_tensors(networks.network_path("upright"), {"weight": torch.zeros(2)})
    networks.network_path("upright").with_suffix(".json").write_text(content)
    one_line(
        lambda: networks.load_sources(load_params(), torch.device("cpu")),
        r"models/finetune/upright.json: not what the stage finetune leaves .*; run: dvc repro -f finetune",
    )


def test_a_folder_in_the_place_of_a_file_is_told_of(tmp_path):
    one_line(lambda: sha256(tmp_path), "cannot be read .Is a directory")
    one_line(lambda: sha256(tmp_path / "gone"), "cannot be read .No such file")
    one_line(lambda: read_columns(tmp_path, [], []), "cannot be read .Is a directory")
