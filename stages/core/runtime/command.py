"""What every stage's command line does around its one sentence.

Exit status: 0 done, 1 something the user gave (one line), 2 wrong arguments, 70 a fault of ours (its traceback), 130
Ctrl-C, 141 nobody reads what is printed, 143 the DVC that had started the stage is gone.
"""

import gc
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from types import TracebackType

from stages.core.runtime.copied_process import run_as_copy
from stages.core.runtime.errors import InputError
from stages.core.runtime.messages import start_logging

OUR_FAULT = 70  # EX_SOFTWARE of sysexits.h
LOOKS = 0.5  # seconds between two looks at the parent
GRACE = 2.0  # seconds to leave after it is gone
SAID = (
    "STAGES_SAID"  # the variable with the file that a rank's last line goes to (stages.core.runtime.spread)
)
REPEATED = ("stages.fit",)  # stages that one DVC runs many times
SHELLS = ("sh", "bash", "dash", "zsh", "fish", "ksh")


def command(main: Callable[..., None], *arguments: str, helps: bool = True) -> None:
    """Call ``main`` with the words of the command line and exit with its status.

    ``arguments`` names the words that must be there; a last one of "..." allows more. ``-v`` shows more: time, place
    and level of each line, what else is logged, and where an error comes from. An InputError becomes one line on
    stderr and status 1; Ctrl-C becomes status 130. helps: answer ``--help`` with what the module says of itself.
    """
    gc.freeze()  # what was imported stays, at the end too
    gc.enable()
    verbose = bool({"-v", "--verbose"} & set(sys.argv[1:]))
    start_logging(verbose)
    stage = main.__module__ if main.__module__ != "__main__" else module_name()
    words = [word for word in sys.argv[1:] if word not in ("-v", "--verbose")]
    more = arguments[-1:] == ("...",)
    least = len(arguments) - more
    usage = " ".join(
        [f"python -m {stage}", *("[...]" if n == "..." else f"<{n}>" for n in arguments), "[-v]"]
    )
    if helps and {"-h", "--help"} & set(words):
        about = (sys.modules[main.__module__].__doc__ or "").strip()
        main, words = partial(sys.stdout.write, f"usage: {usage}\n\n{about}\n"), []
    elif len(words) < least or (len(words) > least and not more):
        say(f"{stage}: found {len(words)} arguments; usage: {usage}")
        sys.exit(2)
    try:
        try:
            main(*words)
        finally:
            sys.stdout.flush()
    except InputError as error:
        if verbose:
            traceback.print_exc()
        say(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        say(INTERRUPTED.format(stage))
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 (printed as Python would, but with a status of its own)
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.exit(128 + signal.SIGPIPE)
        traceback.print_exc()
        sys.exit(OUR_FAULT)


def _reader_is_gone() -> bool:
    """Whether what is printed is read no longer, as behind `| head -1`; then the rest is thrown away."""
    try:
        sys.stdout.write("\n")  # what failed may not have been kept
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


INTERRUPTED = "{}: interrupted; run the same command again"


def begin() -> None:
    """What a stage does before it imports, which takes seconds: Ctrl-C is one line from now on, DVC is watched.

    Nor is garbage looked for among what is imported, a third of the time that importing torch and ending takes.
    """
    gc.disable()
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            say(INTERRUPTED.format(module_name()))
        else:
            shown(kind, error, trace)

    sys.excepthook = hook
    if "DVC_STAGE" in os.environ and module_name() in REPEATED:
        run_as_copy(module_name(), _chain()[-1], end_with_dvc, _end_without)
    end_with_dvc()


def end_with_dvc() -> None:
    """Have this process end soon after the DVC that started it, however that ends: a newer run must have the outputs.

    A rank likewise, after what started the ranks. Only where DVC says that it runs a stage: one that a shell started
    outlives its shell, as under nohup. The system can send a signal at a parent's death on Linux alone, and at that of
    the thread that started the process, so the parent is looked at instead; where a shell stands between, its parent
    too.
    """
    if any(name in os.environ for name in ("DVC_STAGE", "TORCHELASTIC_RUN_ID", SAID)) and hasattr(
        os, "getppid"
    ):
        threading.Thread(target=_watch, args=(_chain(),), daemon=True).start()


def _chain() -> list[int]:
    """This process and those above it, up to the one that waits for the stage."""
    chain = [os.getpid(), os.getppid()]
    if _name(chain[-1]) in SHELLS and (above := _parent(chain[-1])):
        chain.append(above)
    return chain


def _watch(chain: list[int]) -> None:
    while all(_parent(child) == parent for child, parent in itertools.pairwise(chain)):
        time.sleep(LOOKS)
    _end_without("dvc" if "DVC_STAGE" in os.environ else "process")


def _end_without(what: str) -> None:
    """End this process, which was started by one that is gone."""
    say(f"{module_name()}: the {what} that started it is gone; run the same command again")
    os.kill(os.getpid(), signal.SIGINT)  # removes what is half written
    time.sleep(GRACE)
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(128 + signal.SIGTERM)


def _parent(process: int) -> int | None:
    import psutil  # here: only where DVC runs the stage

    try:
        return psutil.Process(process).ppid()
    except psutil.Error:
        return None


def _name(process: int) -> str:
    import psutil

    try:
        return psutil.Process(process).name()
    except psutil.Error:
        return ""


def say(line: str) -> None:
    """The one line at the end. A rank leaves it to the process that started it, so that it is said once."""
    if SAID in os.environ:
        with open(os.environ[SAID], "w") as file:
            file.write(line)
        return
    print(f"error: {line}", file=sys.stderr, flush=True)  # noqa: T201


def module_name() -> str:
    """The module that Python was told to run."""
    words = sys.orig_argv
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return os.path.basename(sys.argv[0])
