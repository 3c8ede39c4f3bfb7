"""What is in the bucket, a page at a time and never more than some thousands of keys; as anonymous as the downloads.

python -m stages.artifacts list [PREFIX]
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from tabulate import tabulate
from tqdm import tqdm

from stages.artifacts.client import Store
from stages.core.runtime.errors import InputError
from stages.core.settings.places import kind_of, split_url
from stages.core.settings.profiles import Profile

KEYS_A_PAGE = 1000  # keys, the most that S3 gives at once
MOST_KEYS = 10_000  # keys that are asked for
NEAR = 3  # keys named for one that is missing
ROOM = 130  # characters for them in a line
PROFILES_SHOWN = 4  # profiles named for one key

Uses = Mapping[str, Sequence[str]]  # key -> the profiles that use it


@dataclass(frozen=True)
class Entry:
    """An object: its key, without ``artifacts.prefix``, and its bytes."""

    key: str
    size: int


def listed(store: Store, prefix: str = "", most: int = MOST_KEYS) -> tuple[list[Entry], bool]:
    """The first ``most`` objects whose keys start with ``prefix``, by key, and whether there are more.

    Raises InputError in one line: unreachable endpoint, missing bucket, a bucket that may not be listed.
    """
    found, more = [], False
    for page in _pages(store, prefix, most):
        found += page
        more = len(found) > most
        if more:
            break
    return found[:most], more


def _pages(store: Store, prefix: str, most: int) -> Iterator[list[Entry]]:
    token, cut = None, len(store.object(""))
    while True:
        given = {
            "Bucket": store.bucket,
            "Prefix": store.object(prefix),
            "MaxKeys": min(KEYS_A_PAGE, most + 1),
        }
        given |= {"ContinuationToken": token} if token else {}
        answer = store.ask(
            lambda given=given: store.client.list_objects_v2(**given), f"{store.name(prefix)}*"
        )
        objects, token = answer.get("Contents", ()), answer.get("NextContinuationToken")
        more = answer.get("IsTruncated")  # None: as of a page that asks for a password
        whole = all("Key" in one and one.get("Size", -1) >= 0 for one in objects)
        if more is None or (more and not token) or not whole:
            raise InputError(
                f"{store.endpoint}: answers with what is no list of keys; artifacts.endpoint must be an S3 server"
            )
        yield [Entry(one["Key"][cut:], one["Size"]) for one in objects]
        if not more:
            return


def uses(profiles: Mapping[str, Profile], bucket: str) -> dict[str, list[str]]:
    """Keys of ``bucket`` that profiles name, each with the profiles; not what is made here or comes from a path."""
    found: dict[str, list[str]] = {}
    for name, profile in profiles.items():
        places = [task.checkpoint for task in profile.tasks.values()]
        places += [place for data in profile.data.values() for place in data.places]
        for place in dict.fromkeys(places):
            key = place
            if kind_of(place) == "url":
                where, key = split_url(place)
                if where != bucket:
                    continue
            if kind_of(place) in ("key", "url"):
                found.setdefault(key, []).append(name)
    return found


def table(store: Store, prefix: str, of: Uses, wanted: Uses) -> str:
    """The bucket as text: its keys, sizes and the profiles ``of`` that use them.

    wanted: keys that ought to be there; those that are not are named with what is nearest, if all keys were seen.
    """
    entries, more = listed(store, prefix)
    total = tqdm.format_sizeof(sum(entry.size for entry in entries), "B")
    title = f"{store.name(prefix)}*: {len(entries)} object{'s' if len(entries) != 1 else ''}, {total}"
    title += f", and more; narrow it down: python -m stages.artifacts list {prefix}..." if more else ""
    rows = [
        [_shown(entry.key), tqdm.format_sizeof(entry.size, "B"), _some(of.get(entry.key, ()))]
        for entry in entries
    ]
    parts = [
        title,
        *([tabulate(rows, ["key", "size", "used by"], "simple", disable_numparse=True)] if rows else []),
    ]
    keys = [entry.key for entry in entries]
    missing = [] if more else [key for key in wanted if key.startswith(prefix) and key not in keys]
    if missing:
        rows = [
            [key, _some(wanted[key]), ", ".join(map(_shown, nearest(key, keys, 1))) or "-"] for key in missing
        ]
        header = ["named in a profile, not there", "used by", "nearest key"]
        parts.append(tabulate(rows, header, "simple", disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def closest(store: Store, key: str) -> str:
    """Advice for a key that is missing: the nearest keys that are there, or why they are not known."""
    try:
        entries, _ = listed(store)
    except InputError as error:
        return f"what it holds is not known ({error})"
    found = nearest(key, [entry.key for entry in entries])
    while len(", ".join(found)) > ROOM and len(found) > 1:
        found.pop()
    said = (
        f"closest keys there: {', '.join(found)}" if found else f"none of its {len(entries)} keys is like it"
    )
    return f"{said}; see python -m stages.artifacts list"


def nearest(key: str, keys: Sequence[str], count: int = NEAR) -> list[str]:
    """The ``count`` keys most like ``key``, best first: a file's own name counts as much as its folders."""

    def likeness(other: str) -> float:
        pairs = ((key, other), (key.rpartition("/")[2], other.rpartition("/")[2]))
        return sum(SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs) / 2

    scores = {other: likeness(other) for other in keys}
    return [other for other in sorted(scores, key=lambda k: (-scores[k], k))[:count] if scores[other] > 0.4]


def _shown(key: str) -> str:
    """Without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in key)


def _some(profiles: Sequence[str]) -> str:
    more = len(profiles) - PROFILES_SHOWN
    return (", ".join(profiles[:PROFILES_SHOWN]) + (f" and {more} more" if more > 0 else "")) or "-"
