"""What is kept between runs, when several processes want it at once."""

import subprocess
import sys

FILL = """
import sys, time
from pathlib import Path
from stages.core.runtime.cache import kept_file

def write(path):
    time.sleep(0.5)
    path.write_bytes(b"x" * 100_000)
    print("wrote")

print(len(kept_file("one", write).read_bytes()))
"""


def test_processes_at_once_write_a_kept_file_once_and_all_read_it_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    running = [
        subprocess.Popen([sys.executable, "-c", FILL], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert sorted(said) == [["100000"]] * 3 + [["wrote", "100000"]]
