"""The adapter that a run begins with."""

import math
from collections.abc import Mapping

import numpy as np

from emlocal.errors import UsageError
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.sampling.draw import request_key
from emlocal.training.settings import TrainingSettings


def new_adapter(layers: Mapping[str, tuple[int, int]], settings: TrainingSettings) -> Adapter:
    """An adapter that changes nothing yet: A is random, B is 0 (Hu et al. 2021, §4.1).

    A's numbers are uniform within ±1/√in, as linear layers begin, and come from the seed and the layer's
    name: they are the same on every engine.

    Args:
        layers: (out, in) of each linear layer of the model, by its name.
    Raises:
        UsageError: no layer has one of the wanted names.
    """
    chosen = {name: shape for name, shape in layers.items() if _last(name) in settings.target_modules}
    missing = set(settings.target_modules) - {_last(name) for name in chosen}
    if missing:
        raise UsageError(
            f"the model has no linear layer called {' or '.join(sorted(missing))}",
            f"give some of these: --target-modules {','.join(sorted({_last(name) for name in layers}))}",
        )
    pairs = {}
    for name, (rows, columns) in chosen.items():
        key = np.array([settings.seed, request_key(name)], dtype=np.uint64)
        uniform = np.random.Generator(np.random.Philox(key=key)).random((settings.rank, columns))
        a = ((2 * uniform - 1) / math.sqrt(columns)).astype(np.float32)
        b = np.zeros((rows, settings.rank), np.float32)
        pairs[name] = LoraPair(a, b, settings.alpha / settings.rank)
    return Adapter(pairs)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
