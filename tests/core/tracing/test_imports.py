"""A network is traced once: no later stage imports the compiler, or the room that uses it."""

import subprocess
import sys

import pytest

LATER = ["statistics", "match", "allocate", "fit", "recalibrate", "probe", "report"]


@pytest.mark.parametrize("stage", LATER)
def test_later_stages_import_no_compiler(stage):
    code = (
        f"import sys, stages.{stage}.__main__\n"
        "compiler = ('torch.export._trace', 'torch._dynamo', 'torch._inductor', 'stages.core.tracing')\n"
        "print([m for m in sys.modules if m.startswith(compiler)])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
