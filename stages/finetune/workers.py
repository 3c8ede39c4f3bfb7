"""Several networks trained side by side, each in a process of its own with one thread."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.core.images.load import load_images
from stages.core.networks.checkpoints import load_network
from stages.core.runtime.device import generator, prepare
from stages.core.runtime.errors import InputError
from stages.core.runtime.progress import Bar
from stages.core.settings.places import file_name
from stages.core.settings.profiles import Architecture, Finetune, TaskSettings
from stages.finetune.train import train


@dataclass(frozen=True)
class Job:
    """One network to train: all that its process needs to know."""

    name: str
    architecture: Architecture
    task: TaskSettings
    settings: Finetune
    seeds: tuple[int, ...]
    artifacts: tuple[Path, Path]  # roots of the data and of the checkpoints
    device: str
    mixed_precision: bool


@dataclass(frozen=True)
class Trained:
    """What comes back: the state dict as NumPy arrays, which need no shared memory, and a row per epoch."""

    name: str
    state: dict[str, np.ndarray]
    rows: list[dict[str, Any]]


def run(job: Job, after_epoch: Any = lambda: None) -> Trained:
    """Load, train and return one network. ``epochs: 0`` returns the checkpoint as it is and reads no images.

    Raises InputError, naming the task.
    """
    data, checkpoints = job.artifacts
    network = load_network(job.architecture, checkpoints / file_name(job.task.checkpoint))
    rows = []
    if job.settings.epochs:
        images = load_images(job.task.data, "train", data)
        try:
            rows = train(
                network,
                images,
                job.task.data,
                job.settings,
                generator(*job.seeds),
                torch.device(job.device),
                job.mixed_precision,
                after_epoch,
            )
        except InputError as error:
            raise InputError(f"task {job.name}: {error}") from error
    state = {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
    return Trained(job.name, state, rows)


def run_all(jobs: list[Job], workers: int) -> Iterator[Trained]:
    """Yield each network as it is done: on a CPU ``workers`` at a time, on a GPU one after the other.

    On a CPU the result does not depend on ``workers``: each network has one thread in any case. When one job
    fails, or on Ctrl-C, the other processes are ended at once. Raises the InputError of a job.
    """
    total = sum(job.settings.epochs for job in jobs)
    with Bar(total=total, desc="finetune", unit="epoch", shown=total > 0) as bar:
        if total == 0 or any(job.device != "cpu" for job in jobs):
            for job in jobs:
                yield run(job, bar.update)
        else:
            yield from _side_by_side(jobs, workers, bar)


def _side_by_side(jobs: list[Job], workers: int, bar: Bar) -> Iterator[Trained]:
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads can hang
    epochs = context.SimpleQueue()
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (epochs,))
    try:
        with _interrupts_held():
            pending = {executor.submit(_work, job) for job in jobs}
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not epochs.empty():
                bar.update(epochs.get())
            for future in done:
                yield future.result()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            message = "finetune: a training process was ended from outside (out of memory?)"
            raise InputError(message) from error
        raise
    finally:  # processes that are done leave by themselves, and take their semaphores with them
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started inside never see Ctrl-C (they inherit the mask): their parent does, and ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_epochs: "SimpleQueue[int] | None" = None


def _start(epochs: "SimpleQueue[int]") -> None:
    global _epochs
    _epochs = epochs
    prepare("cpu", threads=1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its children, so they watch it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job) -> Trained:
    return run(job, lambda: _epochs.put(1))
