"""The source checkpoints and data sets of the active profile, from `source`, as files of the workspace."""

from pathlib import Path

from stages.core.command import command
from stages.core.errors import InputError
from stages.core.homes import HOMES
from stages.core.params import load_params
from stages.core.profiles import Profile

MODELS, DATA = Path("models/artifacts"), Path("data/artifacts")


def main() -> None:
    params = load_params()
    files = outputs(params.active)
    clear(keep=set(files.values()))
    if params.source == "s3":
        from stages.artifacts import bucket

        bucket.materialise(params.artifacts, files)
    elif params.source == "local":
        from stages.artifacts import local

        homes = {key: HOMES[own.kind] for own in params.active.data.values() for key in own.keys}
        local.materialise(files, homes)
    else:
        from stages.artifacts import embedded

        embedded.materialise(params.active, params.seed, files)


def outputs(profile: Profile) -> dict[str, Path]:
    """Key -> where its file belongs. Raises InputError for keys that cannot be files side by side."""
    models = {task.checkpoint: MODELS / task.checkpoint for task in profile.tasks.values()}
    data = {key: DATA / key for own in profile.data.values() for key in own.keys}
    for key in [*models, *data]:
        if {"", ".", ".."} & set(key.split("/")):
            raise InputError(
                f"key {key!r}: leaves its folder; allowed: names joined by '/', none '.' or '..'"
            )
    if both := models.keys() & data.keys():
        raise InputError(f"key {min(both)!r}: names a checkpoint and a data set; allowed: one of the two")
    files = models | data
    for path in files.values():
        if inside := set(path.parents) & set(files.values()):
            raise InputError(f"key {path}: lies inside {min(inside)}, which is a file; rename one of the two")
    return files


def clear(keep: set[Path]) -> None:
    """Remove from the output folders what another profile, or a killed run, left there."""
    for path in sorted([*MODELS.rglob("*"), *DATA.rglob("*")], reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in keep and path.name != ".gitignore":
            path.unlink()


if __name__ == "__main__":
    command(main)
