"""Write a profile for two or more networks of your own, having looked at them and tried them.

python -m stages.new my_pair --checkpoint first=a.pth --checkpoint second=b.pth \\
    --images first=photos/first --images second=photos/second

What is not given is asked for on a terminal. Nothing is written unless every check passes.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from stages.core.graph.source import Task
from stages.core.networks.checkpoints import load_network, read_state
from stages.core.runtime.command import command
from stages.core.runtime.errors import InputError
from stages.core.settings.params import Params, first_line, load_params
from stages.core.settings.profiles import Architecture, Data, Profile
from stages.core.settings.sections import Name, Section
from stages.core.settings.yaml_text import parse_yaml
from stages.core.tracing.sources import make_sources
from stages.own.checkpoint import norms, recognise, with_classes_of
from stages.own.folder import Folder, look
from stages.own.parser import Parser
from stages.own.profile import add, place_of, profile_text
from stages.own.trial import Tried, channels, compare, one_image, right, scalings, sizes
from stages.probe.chance import at_chance, chance, warning

TEST_IMAGES = 500  # of each task, for the accuracy that is shown


@dataclass(frozen=True)
class Own:
    """One network of the user's with its images, and how they are preprocessed."""

    name: str
    checkpoint: Path
    network: nn.Module
    folder: Folder
    data: Data
    tried: Sequence[Tried]  # ways to preprocess that were compared; none where all was given


def main(*words: str) -> None:
    """Look, try, write, and say what to run. Raises InputError in one line for what cannot be used."""
    given = arguments(words)
    params = load_params()
    checked_name(given.name)
    if given.name in params.profiles:
        raise InputError(f"new: profile {given.name!r} is in params.yaml already; allowed: another name")
    checkpoints = tasks_of("--checkpoint", given.checkpoint, ())
    images = tasks_of("--images", given.images, list(checkpoints))
    states = {name: read_state(path) for name, path in checkpoints.items()}
    first = next(iter(states))
    architecture = recognise(
        states[first], str(checkpoints[first]), network(given, states[first]), given.argument
    )
    say(f"{'found':<10}{described(architecture)}")
    owns = []
    for name, path in checkpoints.items():
        own = examine(name, path, with_classes_of(architecture, states[name]), look(images[name]), given)
        owns.append(own)
        say(f"{name:<10}{path}: {len(own.folder.classes)} classes, {norms(own.network)}")
        say(f"{'':<10}{own.folder.path}: {own.folder.described()}")
        say(*(f"{'':<10}{line}" for line in judged(own)))
    labels, why = label_space(owns, given.labels)
    say(f"{'labels':<10}{labels}: {why}")
    mergeable(owns, labels)
    profile = profile_of(architecture, owns, labels)
    comment = f"{len(owns)} networks, by python -m stages.new"
    add(Path("params.yaml"), given.name, profile_text(given.name, profile, comment))
    say(*(f"{'not known':<10}{line}" for line in unknown(owns, architecture, given)))
    say(f"{'written':<10}profile {given.name}, in params.yaml")
    say(f"{'run':<10}{to_run(given.name, profile, params)}")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser("python -m stages.new", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", help="of the profile, in params.yaml")
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="NAME=PATH", help="of a task; two or more"
    )
    parser.add_argument("--images", action="append", default=[], metavar="NAME=FOLDER",
                        help="of the same task: train/<class>/ and test/<class>/, or an archive of that")  # fmt: skip
    parser.add_argument(
        "--labels", choices=("shared", "separate"), help="by default as the names of the classes say"
    )
    parser.add_argument(
        "--network", help="an architecture's name, or package.module:function, where it is not found"
    )
    parser.add_argument(
        "--argument", action="append", default=[], metavar="NAME=VALUE", help="of that function"
    )
    parser.add_argument("--size", type=int, help="pixels of an image as the network takes it")
    parser.add_argument("--resize", type=int, help="pixels of the shorter side before the centre is cut out")
    parser.add_argument("--channels", type=int, choices=(1, 3))
    parser.add_argument(
        "--mean", type=float, nargs="+", help="of the pixels, in 0 to 1: one number, or one a channel"
    )
    parser.add_argument("--std", type=float, nargs="+")
    found = parser.parse_args(words)
    found.argument = {
        key: parse_yaml(value, f"new: --argument {key}")
        for key, value in pairs("--argument", found.argument).items()
    }
    if (found.mean is None) != (found.std is None):
        raise InputError("new: found one of --mean and --std; allowed: both or neither")
    return found


def pairs(flag: str, found: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words as a mapping. Raises InputError for other words and for a name twice."""
    split = [word.partition("=") for word in found]
    names = [name for name, _, _ in split]
    if not all(name and value for name, _, value in split) or len(set(names)) < len(names):
        what = "VALUE" if flag == "--argument" else "PATH, as first=a.pth"
        raise InputError(f"new: {flag}: found {', '.join(found)}; allowed: NAME={what}, each name once")
    return {name: value for name, _, value in split}


def tasks_of(flag: str, found: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """The paths of a flag by task, asked for where they are missing; ``names``: the tasks, where they are known."""
    given = pairs(flag, found)
    if not names:
        while len(given) < 2 or (not found and sys.stdin.isatty()):
            answer = ask(f"{flag} NAME=PATH" + (" (nothing: no more)" if len(given) > 1 else ""), flag)
            if not answer and len(given) > 1:
                break
            given |= pairs(flag, [answer])
    for name in names:
        if name not in given:
            given[name] = ask(f"{flag} {name}=", flag)
    if names and set(given) != set(names):
        raise InputError(f"new: {flag}: found {', '.join(given)}; allowed: the tasks {', '.join(names)}")
    return {checked_name(name): Path(path).expanduser() for name, path in given.items()}


def checked_name(name: str) -> str:
    """The name of a profile or a task. Raises InputError for one that params.yaml, or DVC's -S, does not allow."""
    try:
        found = TypeAdapter(Annotated[Name, Field(max_length=100)]).validate_python(name)
    except ValidationError as error:
        raise InputError(f"new: found the name {name!r:.60}; allowed: letters, digits, _, - (100)") from error
    if name.lower() in ("inf", "nan") or not isinstance(parse_yaml(name, "new"), str):
        raise InputError(f"new: found the name {name!r}, to DVC no text; allowed: another, as my_{name}")
    return found


def ask(question: str, flag: str) -> str:
    """The user's answer. Raises InputError where nobody is there to give one."""
    if not sys.stdin.isatty():
        raise InputError(f"new: {flag}: missing; allowed: {question}, or a terminal to be asked on")
    try:
        return input(f"{question.strip()} ").strip()
    except EOFError as error:
        raise InputError(f"new: {flag}: no answer") from error


def network(given: argparse.Namespace, state: Mapping[str, torch.Tensor]) -> str | None:
    """The architecture's name where it was given, or has to be asked for."""
    if given.network is None and sys.stdin.isatty():
        try:
            recognise(state, "")
        except InputError as error:
            say(str(error).removeprefix(": "))
            return ask("--network NAME or package.module:function", "--network")
    return given.network


def examine(
    name: str, path: Path, architecture: Architecture, folder: Folder, given: argparse.Namespace
) -> Own:
    """Load a network, run it, and find how its images are preprocessed. Raises InputError."""
    loaded = load_network(architecture, path)
    fixed = {
        key: getattr(given, key)
        for key in ("size", "resize", "mean", "std")
        if getattr(given, key) is not None
    }
    base = {"kind": "folder", "key": place_of(folder.path, archive=True)}
    base |= {"size": 32, "channels": given.channels or channels(architecture)}
    shapes = [("as given", {})] if given.size else sizes(architecture, folder)
    choices = []
    for shape, own in shapes:
        data = checked(Data, {**base, **own, **fixed})
        outputs = one_image(loaded, data, f"task {name}")
        if outputs != len(folder.classes):
            raise InputError(
                f"task {name}: {path} has {outputs} outputs, {folder.path} {len(folder.classes)} class folders; "
                "allowed: one folder for each output, in the order of their names"
            )
        ways = [("as given", {})] if given.mean else scalings(folder, data)
        choices += [(f"{shape}, {way}", {**own, **scaling, **fixed}) for way, scaling in ways]
    tried = compare(loaded, folder, checked(Data, {**base, **fixed}), choices) if len(choices) > 1 else []
    settings = {**base, **(tried[0].settings if tried else choices[0][1])}
    settings = {key: value for key, value in settings.items() if value is not None}
    return Own(name, path, loaded, folder, checked(Data, settings), tried)


def checked(section: type[Section], found: Mapping[str, Any]) -> Any:
    """A section of params.yaml. Raises InputError in one line."""
    try:
        return section.model_validate(found)
    except ValidationError as error:
        raise InputError(f"new: {first_line(error, section)}") from error


def judged(own: Own) -> list[str]:
    """How its images are preprocessed, how right it is on its test images, and a warning where that is chance."""
    lines = []
    if own.tried:
        best, *others = own.tried
        lines.append(f"preprocessing: {best.name}, the best of {len(own.tried)} ways on labelled train images "
                     f"({best.accuracy:.1f} %; next {others[0].name}, {others[0].accuracy:.1f} %)")  # fmt: skip
    images, labels = own.folder.sample(own.data, "test", TEST_IMAGES)
    found, _ = right(own.network, images, labels, own.data)
    lines.append(
        f"right on {found:.1f} % of {len(labels)} test images; guessing gives {chance(labels):.1f} %"
    )
    if at_chance(found, labels):
        lines.append(f"WARNING: {warning(own.name, found, labels)}")
    return lines


def label_space(owns: Sequence[Own], given: str | None) -> tuple[str, str]:
    """shared or separate, and why."""
    if given:
        return given, "as given"
    if all(own.folder.classes == owns[0].folder.classes for own in owns):
        return "shared", "the class folders have the same names; --labels separate for a head each"
    return "separate", "the class folders have different names: a head for each task"


def mergeable(owns: Sequence[Own], labels: str) -> None:
    """Trace and compare the networks, as the pipeline will. Raises InputError where they cannot be merged."""
    data = owns[0].data
    example = torch.zeros(2, data.channels, data.size, data.size)
    tasks = [Task(own.name, own.folder.classes) for own in owns]
    make_sources([own.network for own in owns], tasks, example, labels)


def profile_of(architecture: Architecture, owns: Sequence[Own], labels: str) -> Profile:
    """The profile of these networks, which are not trained further."""
    tasks: dict[str, dict[str, Any]] = {}
    for own in owns:
        data = own.data.model_dump(exclude_unset=True)
        tasks[own.name] = {"checkpoint": place_of(own.checkpoint), "data": data}
        if architecture.arguments.get("classes", len(own.folder.classes)) != len(own.folder.classes):
            tasks[own.name]["classes"] = len(own.folder.classes)
    found = {
        "architecture": architecture.model_dump(),
        "labels": labels,
        "tasks": tasks,
        "finetune": {"epochs": 0},
    }
    return checked(Profile, found)


def unknown(owns: Sequence[Own], architecture: Architecture, given: argparse.Namespace) -> list[str]:
    """What a checkpoint and a folder do not say, and what was assumed instead."""
    lines = []
    if any(own.tried for own in owns):
        lines.append("how the images were scaled in training; if you know: --size --resize --mean --std")
    lines.append("whether output k is the class of the k-th folder by name, which is assumed")
    if any("/" in place[:1] for own in owns for place in (place_of(own.checkpoint), own.data.key)):
        lines.append("changes of files outside data/own: DVC does not watch them, use dvc repro -f artifacts")
    return lines


def to_run(name: str, profile: Profile, params: Params) -> str:
    """The command that merges them, without the methods that train every layer: hours on a CPU."""
    places = [task.checkpoint for task in profile.tasks.values()] + [own.key for own in profile.data.values()]
    local = params.source != "local" and not all(place.startswith("/") for place in places)
    slow = [row for row, own in params.methods.items() if (own.get("fit") or {}).get("solver") == "adam"]
    words = ["-S source=local"] * local + [f"-S '~methods.{row}'" for row in slow]
    return " ".join([f"dvc exp run -S profile={name}", *words])


def described(architecture: Architecture) -> str:
    arguments = ", ".join(f"{key} {value}" for key, value in architecture.arguments.items())
    return f"{architecture.name} ({arguments})" if arguments else architecture.name


def say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    command(main, "...", helps=False)
