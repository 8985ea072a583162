"""The torch engine: CUDA, and any CPU. Generates and trains."""

import os

# GNU OpenMP's threads wait by spinning; where others want the cores too, that takes them from the one that
# works (docs/decisions.md). Read when torch loads its library.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "1000"
