"""python -m tests.campaigns NAME --times N [--seed S]: tried, what became of them, and every bad one with its seed."""

import importlib
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / name) for name in ("tests", "tests/artifacts", "tests/core/images")]

import torch  # noqa: E402 (behind the paths that the campaigns share with the tests)

from stages.own.parser import Parser  # noqa: E402
from tests.campaigns.rule import Bad  # noqa: E402

NAMES = ("merged", "checkpoint", "image", "archive", "s3", "params", "api", "kill")


def run(name: str, times: int, seed: int, say: bool = False) -> tuple[Counter[str], list[str]]:
    """What became of ``times`` cases, and a line for each bad one."""
    trial = importlib.import_module(f"tests.campaigns.{name}").trial
    found: Counter[str] = Counter()
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(seed, seed + times):
            try:
                found[trial(random.Random(number), Path(folder))] += 1
            except Bad as error:
                bad.append(f"{name} --seed {number} --times 1: {error}")
                if say:
                    print(bad[-1], flush=True)  # noqa: T201
    return found, bad


def main() -> None:
    parser = Parser(prog="python -m tests.campaigns")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.times < 1:
        parser.error(f"found --times {given.times}; allowed: from 1")
    torch.set_num_threads(1)
    found, bad = run(given.name, given.times, given.seed, say=True)
    told = "; ".join(f"{count} {what}" for what, count in found.most_common())
    print(f"{given.name}: tried {given.times}; {told or 'none good'}; bad {len(bad)}")  # noqa: T201
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
