"""emlocal: entropy minimization (EM) for language models on people's own machines (arXiv 2505.15134).

From Python, `emlocal.load("smollm2:135m")` returns a model that can generate, stream and batch (emlocal.api).
`emlocal.finetune`, `emlocal.rl` and `emlocal.evaluate` do what the verbs of the same names do.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emlocal.api import Answer, Method, Model, load
    from emlocal.evaluation.preparation import evaluate
    from emlocal.settings import AdaptiveTemperature, EMInf
    from emlocal.training.runner import finetune, rl

__version__ = "0.1.0"
__all__ = ["AdaptiveTemperature", "Answer", "EMInf", "Method", "Model", "evaluate", "finetune", "load", "rl"]

_WHERE = {
    "AdaptiveTemperature": "emlocal.settings",
    "Answer": "emlocal.api",
    "EMInf": "emlocal.settings",
    "Method": "emlocal.api",
    "Model": "emlocal.api",
    "evaluate": "emlocal.evaluation.preparation",
    "finetune": "emlocal.training.runner",
    "load": "emlocal.api",
    "rl": "emlocal.training.runner",
}


def __getattr__(name: str) -> object:
    """Returns a public name, which is imported when it is first used.

    `import emlocal` therefore loads neither numpy nor an engine.
    """
    if name not in _WHERE:
        raise AttributeError(f"module 'emlocal' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
