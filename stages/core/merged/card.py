"""A model card: what a merged network was made of and how, what it costs, and how it is loaded, as a Markdown page."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.core.merged.cost import built_cost
from stages.core.merged.network import MergedNetwork

WRITTEN_OUT = 20  # class names of a task that are written out


def card(network: MergedNetwork, path: str | Path) -> str:
    """The card of a network that is saved under ``path``. What it can do, measured, is not in it."""
    about, names = network.about, [task.name for task in network.tasks]
    parts = [
        f"# {Path(path).stem}: one network for {' and '.join(map(_plain, names))}",
        f"{len(names)} networks of one architecture, trained apart, merged into one.",
        *_architecture(about),
        _sources(network),
        "## How it was merged",
        _lines(_method(network)),
        "## Size",
        _lines(_size(network)),
        *_preprocessing(about.get("preprocessing")),
        *_refined(about.get("refined")),
        "## How to load it",
        _loading(network, path),
    ]
    return "\n\n".join(parts) + "\n"


def _architecture(about: Mapping[str, Any]) -> list[str]:
    own = about.get("architecture")
    if own is None:
        return []
    arguments = ", ".join(f"{key}: {value}" for key, value in own.get("arguments", {}).items())
    return [f"Architecture: {_plain(own['name'])}" + (f" ({_plain(arguments)})" if arguments else "")]


def _sources(network: MergedNetwork) -> str:
    rows, hashes = [], network.about.get("sources", {})
    for task in network.tasks:
        classes = ", ".join(task.classes[:WRITTEN_OUT]) + (", ..." if len(task.classes) > WRITTEN_OUT else "")
        rows.append([task.name, f"{len(task.classes)}: {classes}", hashes.get(task.name, "not known")])
    return table(["task", "classes", "source network (sha256)"], rows)


def _method(network: MergedNetwork) -> dict[str, Any]:
    method = dict(network.about.get("method", {}))
    labels = {"shared": "one label space", "separate": "a head for each task"}[network.labels]
    layout = "dense: every unit may read every unit" if network.dense else "blocks: none between the networks"
    parts = {
        name: method.pop(name)
        for name in ("name", "matching", "match", "fit", "recalibrate")
        if name in method
    }
    found = {
        name: _settings(value)
        for name, value in parts.items()
        if not (name == "match" and "matching" in parts)
    }
    return {**found, "seed": network.about.get("seed", "not known"), "labels": labels, "layers": layout}


def _settings(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(f"{key} {_settings(own)}" for key, own in value.items() if own is not None)


def _size(network: MergedNetwork) -> dict[str, Any]:
    budget, macs = network.about.get("budget", {}), built_cost(network, "macs")
    groups = network.trace.spec.free
    units = sum(group.size for group in groups.values())
    found = {
        "budget asked": f"{budget['asked']:g} times one source" if "asked" in budget else "not known",
        "budget reached": f"{budget['reached']:.4f}, counted in {budget['counted']}"
        if "reached" in budget
        else "not known",
        "multiply-accumulates of an image": f"{macs:,}, heads of separate label spaces left out",
        "parameters": f"{built_cost(network, 'parameters', heads=True):,}, with them",
        "units shared": f"{sum(network.shared.values())} of {units}, in {len(groups)} groups",
    }
    return found


def _preprocessing(found: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    if not found:
        return []
    keys = list(dict.fromkeys(key for own in found.values() for key in own))
    rows = [[name, *(str(own.get(key, "-")) for key in keys)] for name, own in found.items()]
    return ["## Preprocessing", table(["task", *keys], rows)]


def _refined(record: Mapping[str, Any] | None) -> list[str]:
    plain = {key: value for key, value in (record or {}).items() if isinstance(value, str | int | float)}
    return ["## Refined", _lines(plain)] if plain else []


def _loading(network: MergedNetwork, path: str | Path) -> str:
    task = repr(network.tasks[0].name)
    call = {"shared": "merged(images)", "separate": f"merged(images, task={task})"}[network.labels]
    if network.corrected:
        call = f"merged(images, task={task})"
    lines = ["from stages import load_merged", f"merged = load_merged({str(path)!r})", f"logits = {call}"]
    return "```python\n" + "\n".join(lines) + "\n```"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; whatever a name holds, it stays in its cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines)


def _lines(found: Mapping[str, Any]) -> str:
    return "\n".join(f"- {_plain(key)}: {_plain(value)}" for key, value in found.items())


def _plain(text: Any) -> str:
    """On one line, without what Markdown would make something of."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return "".join(f"\\{c}" if c in "|`<>[]*\\" else c for c in line)
