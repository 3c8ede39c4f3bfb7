"""What a checkpoint is: the architecture whose keys and shapes it has, its classes and its norm layers."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.networks.architectures import ARCHITECTURES, build
from stages.core.networks.checkpoints import COUNTER, unprefixed
from stages.core.runtime.errors import InputError
from stages.core.settings.profiles import Architecture

Tensors = Mapping[str, Tensor]


def recognise(
    state: Tensors, where: str, network: str | None = None, given: Mapping[str, Any] = {}
) -> Architecture:
    """The architecture that has exactly the keys and shapes of ``state``, but for prefixes that all keys have.

    network: a name, or package.module:function, to try instead of all the known ones; given: arguments for it. The
    number of classes is that of the last matrix. ``where`` says in an error which file it is.
    Raises InputError that names the nearest architecture and the first tensor in which it differs.
    """
    for names in unprefixed(state):
        try:
            found = _recognised(names, where, network, given)
        except InputError as error:
            last = error  # the last has the shortest names
            continue
        for name, value in given.items():
            if name not in found.arguments or found.arguments[name] != value:
                said = ", ".join(f"{key}={own!r:.30}" for key, own in found.arguments.items())
                raise InputError(
                    f"{where}: found {found.name} ({said or 'without arguments'}) for --argument {name}={value!r:.30}; "
                    "allowed: what the file says, or none"
                )
        return found
    raise last


def _recognised(state: Tensors, where: str, network: str | None, given: Mapping[str, Any]) -> Architecture:
    differences: dict[str, list[str]] = {}
    for classes in class_counts(state, where):
        if network is not None and ":" in network:
            tried = list(_imported(network, given, classes))
        else:
            known = _known(state, classes)
            tried = [own for own in known if network in (None, own.name)]
            if network is not None and not tried:
                build(network, {**given, "classes": classes})  # a name that is not known is said there
                tried = [Architecture(name=network, arguments={**given, "classes": classes})]
        for architecture in tried:
            found = difference(_shapes(architecture), state)
            if not found:
                return architecture
            differences[architecture.name] = min(differences.get(architecture.name, found), found, key=len)
    name = min(differences, key=lambda name: len(differences[name]))
    raise InputError(
        f"{where}: not known by its keys and shapes; nearest is {name}, which differs in {len(differences[name])} "
        f"tensors, first {differences[name][0]}; allowed: --network with a name or package.module:function"
    )


def class_counts(state: Tensors, where: str = "checkpoint") -> list[int]:
    """How many outputs the head may have: the rows of the last matrix, or else of the last convolution.

    Raises InputError where there is neither.
    """
    weights = [tensor for name, tensor in state.items() if tensor.dim() > 1 and name.endswith("weight")]
    last = [own for own in weights if own.dim() == 2][-1:] + [own for own in weights if own.dim() > 2][-1:]
    if not last:
        raise InputError(f"{where}: has no linear layer and no convolution; allowed: a network with a head")
    return list(dict.fromkeys(int(own.shape[0]) for own in last))


def with_classes_of(architecture: Architecture, state: Tensors) -> Architecture:
    """The architecture with the head that a checkpoint has, if its constructor takes a number of classes."""
    if "classes" not in architecture.arguments:
        return architecture
    counts = class_counts(state)
    made = [
        Architecture(name=architecture.name, arguments={**architecture.arguments, "classes": count})
        for count in counts
    ]
    fit = (own for own in made if any(not difference(_shapes(own), names) for names in unprefixed(state)))
    return next(fit, made[0]) if len(made) > 1 else made[0]


def norms(network: nn.Module) -> str:
    """Its normalisation layers, by kind: `9 BatchNorm2d`, or `no norm layers`."""
    kinds = Counter(type(module).__name__ for module in network.modules() if "Norm" in type(module).__name__)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no norm layers"


def difference(own: Mapping[str, tuple[int, ...]], state: Tensors) -> list[str]:
    """One phrase for each tensor that only one of the two has, or that has another shape."""
    needed = {name for name in own if not name.endswith(COUNTER)}
    return [
        *(f"{name}: not in the file" for name in needed - set(state)),
        *(f"{name}: in the file alone" for name in state if name not in own),
        *(
            f"{name}: {tuple(tensor.shape)} in the file for {own[name]}"
            for name, tensor in state.items()
            if name in own and tuple(tensor.shape) != own[name]
        ),
    ]


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # shapes alone, no memory
        network = build(architecture.name, architecture.arguments)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _known(state: Tensors, classes: int) -> Iterator[Architecture]:
    """Every architecture with a name, with the arguments that ``state`` must come from, if it comes from it."""
    for name in ARCHITECTURES:
        arguments = {"resnet": _resnet, "mlp": _mlp, "vit_b_16": _vit}.get(name, lambda state: {})(state)
        if arguments is not None:
            yield Architecture(name=name, arguments={**arguments, "classes": classes})


def _resnet(state: Tensors) -> dict[str, Any] | None:
    stem = state.get("conv1.weight")
    blocks = sum(f"layer1.{index}.conv1.weight" in state for index in range(len(state)))
    if stem is None or stem.dim() != 4 or not blocks or stem.shape[1] not in (1, 3):
        return None
    return {"depth": 6 * blocks + 2, "width": int(stem.shape[0]), "channels": int(stem.shape[1])}


def _mlp(state: Tensors) -> dict[str, Any] | None:
    layers = [state[name] for index in range(1, len(state)) if (name := f"linear{index}.weight") in state]
    if not layers or any(tensor.dim() != 2 for tensor in layers):
        return None
    return {"inputs": int(layers[0].shape[1]), "widths": [int(tensor.shape[0]) for tensor in layers]}


def _vit(state: Tensors) -> dict[str, Any] | None:
    positions = state.get("encoder.pos_embedding")
    if positions is None or positions.dim() != 3:
        return None
    return {"size": 16 * round((positions.shape[1] - 1) ** 0.5)}


def _imported(name: str, given: Mapping[str, Any], classes: int) -> Iterator[Architecture]:
    """A constructor of somebody else, with the number of classes and, where it takes none, without."""
    for arguments in ({**given, "classes": classes}, dict(given)):
        try:
            build(name, arguments)
        except InputError:
            if arguments == given:
                raise
        else:
            yield Architecture(name=name, arguments=arguments)
            return
