"""A table of where the time of a merge goes: python -m benchmarks [NAME ...] [--images N]

Of latency, of merged networks against their sources: python -m benchmarks latency --help
Of refining, by what it starts from: python -m benchmarks refining --help

Each pair is merged at 1x by the default method, in a process of its own, with one thread.
"""

import json
import os
import subprocess
import sys

from benchmarks.pairs import PAIRS
from stages.core.runtime.command import command
from stages.own.parser import Parser

KINDS = ("forward", "products", "solve", "rest")
HEAD = "| pair, images a task | stage | CPU seconds | forward | products | solve | rest |"


def main(*words: str) -> None:
    if words[:1] == ("latency",):
        from benchmarks import latency

        return latency.main(words[1:])
    if words[:1] == ("refining",):
        from benchmarks import refining

        return refining.main(words[1:])
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(PAIRS)}; all of them if none"
    )
    parser.add_argument("--images", type=int, help="of each task; as usual for the pair if not given")
    given = parser.parse_args(words)
    unknown = [name for name in given.names if name not in PAIRS]
    if unknown or (given.images is not None and given.images < 1):
        parser.error(f"found {unknown or given.images}; allowed: {', '.join(PAIRS)}, and images from 1")
    found = [one(name, given.images or 0) for name in given.names or PAIRS]
    sys.stdout.write("\n".join(table(found)) + "\n")


def one(name: str, images: int) -> dict:
    """What ``benchmarks.one`` says of a pair."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.one", name, str(images)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(found: list[dict]) -> list[str]:
    """Markdown: seconds by stage with their shares, then what was reached and held."""
    lines = [HEAD, "|" + "---|" * 7]
    for own in found:
        for stage, kinds in own["seconds"].items():
            whole = sum(kinds.values())
            shares = " | ".join(f"{100 * kinds.get(kind, 0) / max(whole, 1e-9):.0f} %" for kind in KINDS)
            lines.append(f"| {own['name']}, {own['images']} | {stage} | {whole:.2f} | {shares} |")
    lines += ["", "| pair | CPU seconds of a merge | GFLOP | of the matmul peak | peak memory, GiB |"]
    lines.append("|" + "---|" * 5)
    for own in found:
        reached = own["operations"] / own["merge"] / own["peak"]
        lines.append(
            f"| {own['name']} | {own['merge']:.1f} | {own['operations'] / 1e9:.0f} | {100 * reached:.0f} % of "
            f"{own['peak'] / 1e9:.0f} GFLOP/s | {own['memory'] / 2**30:.2f} |"
        )
    return lines


if __name__ == "__main__":
    command(main, "...", helps=False)
