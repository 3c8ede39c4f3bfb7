"""Values on disk: bit for bit what was kept, the same results as in memory, and nothing left behind."""

import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live

from stages import api
from stages.core.recipe.methods import Fit
from stages.core.runtime.errors import InputError
from stages.core.sweep.batches import images_to_batches
from stages.core.sweep.memory import disk_bytes, disk_peak_bytes, peak_bytes, place_values
from stages.core.sweep.sweep import Sweep
from stages.core.sweep.values import ImagesOnDisk, OnDisk, scratch
from stages.core.units.matching import full_split, identity_matching
from stages.fit.network import fit_network
from stages.fit.setup import Setup
from stages.fit.visitor import FitVisitor
from stages.recalibrate.recalibrate import recalibrate
from stages.statistics.moments import MomentsVisitor, gather

FITS = [
    Fit(),
    Fit(inputs="merged", targets="own", norm="fold"),
    Fit(solver="regmean"),
    Fit(solver="adam", steps=3),
    Fit(solver="adam", inputs="merged", steps=3),
]


@pytest.fixture
def pair(small, images, sources):
    return sources([small(0).float(), small(1).float()], images().float())


def batches_of(images, count, size):
    return images_to_batches([images(count, task).float() for task in (0, 1)], size)


def open_files():
    """Of this process, in the folder of the values."""
    here = str(scratch())
    return [f for f in os.listdir("/proc/self/fd") if _target(f).startswith(here)]


def _target(number):
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except FileNotFoundError:  # the listing's own
        return ""


# -- tensors in files ---------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]),
    order=st.randoms(use_true_random=False),
    kind=st.sampled_from(["plain", "permuted", "narrow", "expanded"]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_what_is_kept_comes_back_in_its_order_of_memory(shape, dtype, order, kind):
    x = torch.randn(shape).mul(3).to(dtype)
    if kind == "permuted":
        x = x.permute(order.sample(range(x.dim()), x.dim()))
    elif kind == "narrow":
        x = torch.cat([x, x], -1).narrow(-1, 1, x.shape[-1])
    elif kind == "expanded":
        x = x[:1].expand(x.shape)
    kept = OnDisk()
    kept.append(x)
    kept.append(x + x)
    for found, given_ in ((kept[0], x), (kept[1], x + x)):
        assert found.dtype == dtype
        assert torch.equal(found, given_)
    if kind in ("plain", "permuted"):
        assert kept[0].stride() == x.stride()
    chosen = torch.tensor([len(x) - 1, 0])
    assert torch.equal(kept.rows(0, chosen), x[chosen])
    kept.close()


def test_images_of_a_notebook_are_found_by_their_numbers():
    parts, kept = [torch.randn(n, 2, 3) for n in (3, 1, 4)], ImagesOnDisk()
    chosen = [kept.add(part) for part in parts]
    for part, own in zip(parts, chosen, strict=True):
        assert torch.equal(kept[own], part)
        assert torch.equal(kept[own[-1:]], part[-1:])
        assert torch.equal(kept[own[::2]], part[::2])


# -- the same results ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", FITS)
def test_a_fit_from_disk_has_the_same_bytes(pair, images, fit):
    spec, found = pair[0].trace.spec, []
    split = full_split(spec, {name: range(group.size // 2) for name, group in spec.free.items()})
    for storage in ("memory", "disk"):
        network, record = fit_network(
            pair, identity_matching(spec, 2), split, batches_of(images, 30, 7), fit, labels="shared",
            storage=storage,
        )  # fmt: skip
        found.append((network.state_dict(), record))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(own, found[1][0][name]) for name, own in found[0][0].items())
    assert not open_files()


@pytest.mark.parametrize("way", ["batchnorm", "repair", "tact"])
def test_statistics_from_disk_have_the_same_bytes(pair, images, way):
    spec, found, batches = pair[0].trace.spec, [], batches_of(images, 30, 7)
    for storage in ("memory", "disk"):
        moments = gather(pair, batches, storage=storage)
        network, _ = fit_network(
            pair,
            identity_matching(spec, 2),
            full_split(spec),
            batches,
            Fit(solver="average"),
            labels="shared",
        )
        recalibrate(network, way, batches, pair, storage=storage)
        found.append((moments, network.state_dict()))
    for point, groups in found[0][0].items():
        for group, own in groups.items():
            assert torch.equal(own.second, found[1][0][point][group].second)
    assert all(torch.equal(own, found[1][1][name]) for name, own in found[0][1].items())


@pytest.mark.parametrize("method", ["progressive", "pleas"])
def test_a_merge_from_disk_has_the_same_bytes(small, images, method):
    networks = {name: small(seed) for seed, name in enumerate("ab")}
    batches = {name: list(images(30, seed).split(8)) for seed, name in enumerate("ab")}
    one, other = (
        api.merge(networks, batches, 1.3, method, options={"storage": storage}, progress=False).state_dict()
        for storage in ("memory", "disk")
    )
    assert all(torch.equal(own, other[name]) for name, own in one.items())


# -- memory -------------------------------------------------------------------------------------------------------


def disk_peak(sweep, visitor):
    """Bytes of tensors at the worst moment, and what was predicted."""
    place_values(sweep, visitor, "disk")
    promised = disk_peak_bytes(sweep, visitor)
    with Live() as live:
        sweep.run(visitor)
    return live.peak, promised


def late(batches):
    """Images that are not in memory."""
    kept = ImagesOnDisk()
    return [type(b)(kept, b.task, kept.add(b.images)) for b in batches]


@pytest.mark.parametrize(
    ("fit", "maps"), [(FITS[0], False), (FITS[1], True), *((fit, True) for fit in FITS[2:4]), (None, True)]
)
def test_memory_does_not_grow_with_the_images(small, images, sources, fit, maps, monkeypatch):
    monkeypatch.setattr("stages.fit.layer.worthwhile", lambda plan, c: maps)
    monkeypatch.setattr("stages.fit.layer.Layer.few_rows", lambda self, images: None)
    made, found = sources([small(0).float(), small(1).float()], images().float()), []
    spec = made[0].trace.spec
    for count in (20, 100):
        network = fit_network(
            made, identity_matching(spec, 2), full_split(spec), batches_of(images, 4, 4), Fit(solver="average"),
            labels="shared",
        )[0]  # fmt: skip
        visitor = MomentsVisitor(made[0].trace, 2, 2, 1.0, torch.Generator())
        if fit is not None:
            visitor = FitVisitor(Setup(network, made, fit))
        running = network if fit is not None and fit.inputs == "merged" else None
        sweep = Sweep(made, late(batches_of(images, count, 10)), running)
        peak, promised = disk_peak(sweep, visitor)
        assert peak <= 1.02 * promised
        found.append(peak)
    assert found[1] <= 1.05 * found[0]


def test_auto_takes_the_memory_there_is_and_says_so(pair, images, caplog):
    caplog.set_level("INFO")
    sweep, visitor = Sweep(pair, batches_of(images, 400, 10)), MomentsVisitor(pair[0].trace, 2, 2, 1.0, None)
    within, beside = peak_bytes(sweep, visitor), disk_peak_bytes(sweep, visitor)
    assert beside < 0.5 * within
    place_values(sweep, visitor, "auto", 1.01 * within / 2**30, "statistics")
    assert not sweep.keeper.on_disk
    assert not caplog.messages
    place_values(sweep, visitor, "auto", 0.99 * within / 2**30, "statistics")
    assert sweep.keeper.on_disk
    assert "statistics: would take" in caplog.messages[0]
    assert "kept on disk" in caplog.messages[0]
    with pytest.raises(InputError, match=r"statistics: needs .*storage: disk"):
        place_values(sweep, visitor, "memory", 0.99 * within / 2**30, "statistics")
    with pytest.raises(InputError, match=r"statistics, values on disk: needs .* smaller batch_size"):
        place_values(sweep, visitor, "auto", 0.99 * beside / 2**30, "statistics")


def test_freed_memory_is_returned_where_there_is_not_plenty(pair, images):
    sweep, visitor = Sweep(pair, batches_of(images, 40, 10)), MomentsVisitor(pair[0].trace, 2, 2, 1.0, None)
    needed = peak_bytes(sweep, visitor) / 2**30
    for storage, there, sparing in [("memory", 4.1, False), ("memory", 3.9, True), ("disk", 40, True)]:
        place_values(sweep, visitor, storage, there * needed, "statistics")
        assert sweep.sparing == sparing


def test_a_disk_that_is_too_small_is_refused_before(pair, images, monkeypatch):
    sweep, visitor = Sweep(pair, batches_of(images, 40, 10)), MomentsVisitor(pair[0].trace, 2, 2, 1.0, None)
    monkeypatch.setattr("stages.core.sweep.memory.free_disk", lambda: disk_bytes(sweep, visitor) - 1)
    with pytest.raises(
        InputError, match=r"^statistics: needs .* GiB in .*/values, there are .* larger disk$"
    ):
        place_values(sweep, visitor, "disk", None, "statistics")


# -- nothing is left ----------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size):
    """As on a full disk: the system lets no file grow beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_nothing(pair, images):
    with files_of_at_most(20_000), pytest.raises(InputError, match="no space left on the device"):
        gather(pair, batches_of(images, 60, 10), storage="disk")
    assert not open_files()
    assert not list(scratch().iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(pair, images, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be written"):
        gather(pair, batches_of(images, 20, 10), storage="disk")


def test_an_error_in_the_middle_leaves_nothing(pair, images):
    class Fails(MomentsVisitor):
        def visit(self, node, sweep):
            assert open_files()
            raise KeyboardInterrupt

    sweep, visitor = Sweep(pair, batches_of(images, 20, 10)), Fails(pair[0].trace, 2, 2, 1.0, None)
    place_values(sweep, visitor, "disk")
    with pytest.raises(KeyboardInterrupt):
        sweep.run(visitor)
    assert not open_files()


KILLED = """
import time, torch
from torch import nn
from stages.core.sweep.values import OnDisk
kept = OnDisk()
kept.append(torch.ones(2**22))
print("there", flush=True)
time.sleep(60)
"""


def test_a_killed_process_leaves_nothing(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    ) as process:  # fmt: skip
        assert process.stdout.readline() == b"there\n"
        os.kill(process.pid, signal.SIGKILL)
    folder = tmp_path / "pleas-merging/values"
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_what_was_killed_before_its_file_lost_its_name_is_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    left = scratch() / ".left.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("")
    OnDisk().close()
    assert not left.exists()


def test_two_runs_at_once_do_not_meet(pair, images):
    batches = batches_of(images, 60, 10)
    expected = gather(pair, batches)
    with ThreadPoolExecutor(2) as pool:
        for found in [pool.submit(gather, pair, batches, storage="disk") for _ in range(2)]:
            for group, own in expected["after"].items():
                assert torch.equal(found.result()["after"][group].second, own.second)
