"""A merged network as a file that runs elsewhere: ONNX, or torch's exported program.

python -m stages.report.export METHOD --to model.onnx [--task TASK]
"""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from stages.core.merged.file import load_merged
from stages.core.merged.network import MergedNetwork
from stages.core.runtime.command import command
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import replacing

TARGETS = (".onnx", ".pt2")
FOLDER = Path("models/recalibrate")
USAGE = "METHOD --to model.onnx (or .pt2) [--task TASK]"


def main(method: str, *words: str) -> None:
    """Write a merged network of the pipeline to a file. Raises InputError for what is not there or not writable."""
    options = dict(zip(words[::2], words[1::2], strict=False))
    if len(words) != 2 * len(options) or "--to" not in options or not options.keys() <= {"--to", "--task"}:
        raise InputError(f"export: found {' '.join([method, *words])}; allowed: {USAGE}")
    path = FOLDER / f"{method}.safetensors"
    check_target(Path(options["--to"]))
    there = sorted(own.stem for own in FOLDER.glob("*.safetensors"))
    if method not in there:
        raise InputError(
            f"method: found {method!r}; allowed: those in {FOLDER}, {', '.join(there) or 'none yet: run dvc repro'}"
        )
    export(load_merged(path), options["--to"], options.get("--task"))


def check_target(path: Path) -> None:
    """Gate: before anything is loaded. Raises InputError for another suffix, and for a library that is absent."""
    if path.suffix not in TARGETS:
        raise InputError(f"{path}: found suffix {path.suffix!r}; allowed: {', '.join(TARGETS)}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; allowed: a file")
    above = next(own for own in path.absolute().parents if own.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{path}: cannot be written; allowed: a file in a folder that you may write to")
    if path.suffix == ".onnx":
        _onnx()


def _onnx() -> ModuleType:
    try:
        import onnx
        import onnxscript  # noqa: F401 (what torch writes ONNX with)
    except ImportError as error:
        raise InputError(
            f"{error.name}: not installed, .onnx needs it; allowed: pip install -r requirements-onnx.txt, or .pt2"
        ) from error
    return onnx


def export(network: MergedNetwork, path: str | Path, task: str | None = None) -> None:
    """Write ``network.plain(task, fold=True)`` with a free number of images, whole or not at all.

    The input is called ``images``, the output ``logits``. Metadata: ``tasks`` (of each its classes), ``task``,
    ``labels`` and all that the network says about itself, preprocessing (size, channels, mean, std) among it: each a
    JSON text, in an ONNX file as metadata properties, in a .pt2 file as the extra file ``about.json``. Raises
    InputError for another suffix, a task that is not there, and what cannot be written.
    """
    path = Path(path)
    check_target(path)
    plain, example = network.plain(task, fold=True).cpu(), example_of(network)
    about = json.dumps(metadata(network, task), sort_keys=True)
    with quiet(), torch.no_grad():
        program = torch.export.export(
            Wrapped(plain), (example,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},), strict=False
        )
        if path.suffix == ".pt2":
            with replacing(path) as temporary, open(temporary, "wb") as file:
                torch.export.save(program, file, extra_files={"about.json": about})
            return
        written = torch.onnx.export(
            program, (), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
    model = written.model_proto
    _onnx().helper.set_model_props(model, {k: json.dumps(v) for k, v in json.loads(about).items()})
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


class Wrapped(nn.Module):
    """Gives the graph's input the name of what it is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)


def example_of(network: MergedNetwork) -> torch.Tensor:
    """Two zero inputs: torch.export takes a number of one for fixed."""
    first = network.trace.graph.nodes[0]
    shape = network.trace.shapes[first.name]
    kind = next(p.dtype for p in network.parameters())
    integers = first.attributes.get("integers")
    return torch.zeros(2, *shape[1:], dtype=torch.int64 if integers else kind)


def metadata(network: MergedNetwork, task: str | None) -> dict[str, Any]:
    """What a file says beside the weights."""
    tasks = {own.name: list(own.classes) for own in network.tasks}
    own = tasks if network.labels == "separate" else dict(list(tasks.items())[:1])
    chosen = own.values() if task is None or network.labels == "shared" else [tasks[task]]
    return {
        **network.about,
        "tasks": tasks,
        "task": task,
        "labels": network.labels,
        "classes": [name for classes in chosen for name in classes],
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters say about themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


if __name__ == "__main__":
    command(main, "METHOD", "...")
