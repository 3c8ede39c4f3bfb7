"""All of params.yaml that can be looked at before anything is fetched, and where the profile's files belong."""

from pathlib import Path

from stages.core.networks.architectures import check_architecture
from stages.core.recipe.recipe import load_recipe
from stages.core.recipe.rooms import check_rows
from stages.core.runtime.errors import InputError
from stages.core.settings.params import Params, load_params
from stages.core.settings.places import DATA, MODELS, file_name
from stages.core.settings.profiles import Profile


def checked_params() -> Params:
    """params.yaml with every section, row, architecture and place of the active profile checked. Raises InputError."""
    params = load_params()
    check_rows(load_recipe(params))  # a mistake in a row is said now, not after the training
    outputs(params.active)
    for name in params.active.tasks:
        architecture = params.active.architecture_of(name)
        check_architecture(architecture.name, architecture.arguments)
    return params


def outputs(profile: Profile) -> dict[str, Path]:
    """Place -> where its file belongs. Raises InputError for names that cannot be files side by side."""
    models = {task.checkpoint: MODELS / file_name(task.checkpoint) for task in profile.tasks.values()}
    data = {place: DATA / file_name(place) for own in profile.data.values() for place in own.places}
    for place in [*models, *data]:
        if {"", ".", ".."} & set(file_name(place).split("/")):
            raise InputError(
                f"key {place!r}: leaves its folder; allowed: names joined by '/', none '.' or '..'"
            )
    if both := models.keys() & data.keys():
        raise InputError(f"key {min(both)!r}: names a checkpoint and a data set; allowed: one of the two")
    files = models | data
    for path in files.values():
        if inside := set(path.parents) & set(files.values()):
            raise InputError(f"key {path}: lies inside {min(inside)}, which is a file; rename one of the two")
    return files
