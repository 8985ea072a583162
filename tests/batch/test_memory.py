"""A long input needs no more memory than a short one."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import sys
from collections.abc import Sequence
import numpy as np
from emlocal.backends.fake import END, VOCABULARY
from emlocal.batch.lines import Item
from tests.batch.batches import batch_on, engine, settings
from tests.batch.writer import peak_bytes

ROW = np.zeros(VOCABULARY, dtype=np.float32)
ROW[END] = 50

def script(tokens: Sequence[int]) -> np.ndarray:
    return ROW

lines = (Item(i, None, None, f"prompt {i}", raw=True) for i in range(int(sys.argv[1])))
how = settings(ordered=True, keep=True)
print(sum(1 for row in batch_on(engine(8, script), lines, how, 8).rows()), peak_bytes())
"""


def test_memory_does_not_grow_with_the_input() -> None:
    peaks = []
    for lines in (1_000, 100_000):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(lines)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        rows, peak = map(int, done.stdout.split())
        assert rows == lines
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 12_000_000  # the given names are kept on disk, behind a small cache
