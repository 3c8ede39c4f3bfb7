"""The source checkpoints and data sets of the active profile, from `source`, as files of the workspace.

python -m stages.artifacts                  ->  models/artifacts, data/artifacts
python -m stages.artifacts list [PREFIX]        what the bucket holds, and which profiles use it
"""

import sys
from pathlib import Path

from stages.artifacts.settings import checked_params, outputs
from stages.core.runtime.command import command
from stages.core.runtime.errors import InputError
from stages.core.settings.datasets import HOMES
from stages.core.settings.params import PROFILE_FILES, load_params, profiles_by_file
from stages.core.settings.places import DATA, MODELS, kind_of

LONGEST_KEY = 1024  # bytes, of S3
KINDS = ("path", "local", "url", "s3", "initial", "embedded")  # what a file comes from


def main(*words: str) -> None:
    if words:
        return show(*words)
    params = checked_params()
    profile, files = params.active, outputs(params.active)
    clear(keep=set(files.values()))
    homes = {place: HOMES[own.kind] for own in profile.data.values() for place in own.places}
    of: dict[str, dict[str, Path]] = {kind: {} for kind in KINDS}
    for place, path in files.items():
        of[params.source if kind_of(place) == "key" else kind_of(place)][place] = path
    if of["path"] or of["local"]:
        from stages.artifacts import local

        folders = {place for own in profile.data.values() if own.kind == "folder" for place in own.places}
        local.materialise(of["path"], homes, Path(), folders)
        local.materialise(of["local"], homes, Path(params.own), folders)
    if of["url"] or of["s3"]:
        from stages.artifacts import bucket

        bucket.materialise_urls(params.artifacts, of["url"])
        bucket.materialise(params.artifacts, of["s3"])
    if of["initial"] or of["embedded"]:
        from stages.artifacts import embedded

        embedded.materialise(profile, params.seed, of["initial"] | of["embedded"])


def show(word: str, prefix: str = "", *more: str) -> None:
    """Write what the bucket holds to stdout. Raises InputError for other words, and when it cannot be listed."""
    from stages.artifacts import listing
    from stages.artifacts.client import Store

    if word != "list" or more or prefix.startswith("--"):
        raise InputError(
            f"artifacts: found {' '.join([word, prefix, *more]).strip()}; allowed: nothing, or list [PREFIX]"
        )
    if not prefix.isprintable() or len(prefix.encode()) > LONGEST_KEY:
        raise InputError(
            f"artifacts list: found a prefix {prefix[:40]!r}; allowed: printable, at most {LONGEST_KEY} bytes"
        )
    store, bucket = Store(load_params().artifacts), load_params().artifacts.bucket
    files = profiles_by_file()
    of = listing.uses({name: own for profiles in files.values() for name, own in profiles.items()}, bucket)
    wanted = listing.uses(
        files.get(PROFILE_FILES[-1], {}), bucket
    )  # the others are made here or are the user's
    sys.stdout.write(listing.table(store, prefix, of, wanted))


def clear(keep: set[Path]) -> None:
    """Remove from the output folders what another profile, or a killed run, left there."""
    for path in sorted([*MODELS.rglob("*"), *DATA.rglob("*")], reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in keep and path.name != ".gitignore":
            path.unlink()


if __name__ == "__main__":
    command(main, "...")
