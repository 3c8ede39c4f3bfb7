"""Merge neural networks that were trained apart: ``merge`` in memory, ``load_merged`` from a file.

``inspect`` shows what a network looks like to the merge.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.api import merge
    from stages.core.merged.file import load_merged
    from stages.inspection import inspect

__all__ = ["inspect", "load_merged", "merge"]

if sys.argv[:1] == ["-m"]:  # Python is about to run a stage, which imports for seconds
    from stages.core.runtime.command import begin

    begin()


def __getattr__(name: str) -> Any:
    """Load the notebook face when it is asked for, so that a stage does not import its siblings."""
    if name in __all__:
        from stages import api

        return getattr(api, name)
    raise AttributeError(f"module 'stages' has no attribute {name!r}")
