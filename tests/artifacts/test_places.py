"""Keys, s3:// URLs and paths of this machine, side by side in one profile."""

import re

import pytest
import yaml
from loopback import CONTENT, OTHER

from stages.artifacts.settings import outputs
from stages.core.networks.checkpoints import load_network
from stages.core.settings import places
from stages.core.settings.params import load_params


@pytest.mark.parametrize(
    ("place", "kind", "file"),
    [
        ("rn50/cub/v1a/model.pth", "key", "rn50/cub/v1a/model.pth"),
        ("cub.tgz", "key", "cub.tgz"),
        ("initial/a/b.pth", "initial", "initial/a/b.pth"),
        ("s3://a-bucket/b/c.pth", "url", "s3/a-bucket/b/c.pth"),
        ("/home/me/net.pth", "path", "paths/[0-9a-f]{12}/net.pth"),
        ("~/net.pth", "path", "paths/[0-9a-f]{12}/net.pth"),
        ("./net.safetensors", "path", "paths/[0-9a-f]{12}/net.safetensors"),
        ("../net.pt", "path", "paths/[0-9a-f]{12}/net.pt"),
    ],
)
def test_every_place_has_a_kind_and_a_file(place, kind, file):
    assert re.fullmatch(places.PATTERN, place)
    assert places.kind_of(place) == kind
    assert re.fullmatch(file, places.file_name(place))


@pytest.mark.parametrize(
    "place", ["", "s3://", "s3://bucket", "s3://bucket/", "s3://B/x", "http://a/b", "~", "/a/", "-x"]
)
def test_what_is_no_place_is_refused(place):
    assert not re.fullmatch(places.PATTERN, place)


def test_two_paths_of_one_name_are_two_files():
    assert places.file_name("/a/model.pth") != places.file_name("/b/model.pth")


@pytest.fixture
def mixed(workspace, store, front, tmp_path):
    """A workspace whose first checkpoint is an object of a bucket and whose second is a file of the machine."""

    def make(source):
        space = workspace(
            source, source, endpoint=front.address, bucket="nobody-asks", cache=str(tmp_path / "cache")
        )
        path = space.folder / "params.yaml"
        found = yaml.safe_load(path.read_text())
        tasks = found["profiles"]["digits"]["tasks"]
        tasks["upright"]["checkpoint"] = f"s3://{store.bucket}/some/net.pth"
        tasks["rotated"]["checkpoint"] = str(tmp_path / "mine/net.pth")
        path.write_text(yaml.safe_dump(found))
        return space

    store.put("some/net.pth", CONTENT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/net.pth").write_bytes(OTHER)
    return make


def test_each_comes_from_where_it_is_whatever_the_source(mixed):
    space = mixed("embedded")
    code, log = space.run()
    assert code == 0, log
    profile = load_params(space.folder / "params.yaml").active
    files = outputs(profile)
    first, second = (profile.tasks[name].checkpoint for name in ("upright", "rotated"))
    found = space.outputs()
    assert found[files[first].as_posix()] == CONTENT
    assert found[files[second].as_posix()] == OTHER
    assert set(found) == {path.as_posix() for path in files.values()}


def test_a_path_that_is_not_there_is_one_line_and_nothing_is_written(mixed, tmp_path):
    (tmp_path / "mine/net.pth").unlink()
    space = mixed("embedded")
    code, log = space.run()
    assert code == 1
    assert f"error: {tmp_path}/mine/net.pth: no such file" in log.splitlines()[-1]
    assert space.outputs() == {}


def test_an_object_that_is_not_there_is_one_line(mixed, store):
    store.client.delete_object(Bucket=store.bucket, Key="some/net.pth")
    code, log = mixed("embedded").run()
    assert code == 1
    assert f"error: s3://{store.bucket}/some/net.pth:" in log.splitlines()[-1]


def test_initial_networks_are_made_here_whatever_the_source(workspace, tmp_path):
    space = workspace("local", "local")
    path = space.folder / "params.yaml"
    found = yaml.safe_load(path.read_text())
    for name, task in found["profiles"]["digits"]["tasks"].items():
        task["checkpoint"] = f"initial/resnet8/{name}.safetensors"
    path.write_text(yaml.safe_dump(found))
    profile = load_params(path).active
    for data in profile.data.values():
        (space.folder / "data/own" / data.key).parent.mkdir(parents=True, exist_ok=True)
        (space.folder / "data/own" / data.key).write_bytes(b"images")
    code, log = space.run()
    assert code == 0, log
    for name, task in profile.tasks.items():
        load_network(profile.architecture_of(name), space.folder / "models/artifacts" / task.checkpoint)
