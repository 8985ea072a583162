"""The method: entropy minimization, in numpy. What is here is about distributions, not about tokens or text.

This module says what an EM step is. A step is one file in `emlocal.em.steps`: its settings and its
reference, which works on the whole vocabulary in float64 and is written to be read beside the paper (Agarwal
et al. 2025, arXiv 2505.15134). That is enough to run it on every engine. Faster ways (`fast`, the compiled
sampler, torch's and mlx's kernels) are chosen by the step's type where they exist, and are tested against
the reference.

No numpy at import: the settings of a step are needed for `emlocal --help`, which must be quick.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from emlocal.em.entropy import Float64


class Outcome(NamedTuple):
    """What an EM step did to one row."""

    logits: "Float64"
    """[V]; only differences mean anything."""
    entropy_before: float
    """Nats."""
    entropy_after: float
    steps: int
    """EM steps taken; 0 where the row was left alone."""


@dataclass(frozen=True)
class EMResult:
    """What an EM step did to rows of shape [..., V]."""

    logits: "Float64"
    """[..., V]; only differences within a row mean anything."""
    entropy_before: "Float64"
    """[...], nats."""
    entropy_after: "Float64"
    """[...], nats."""
    steps: "NDArray[np.int64]"
    """[...], EM steps taken."""


@dataclass(frozen=True)
class EMStep(ABC):
    """An entropy-minimizing step of the sampler: its settings, and what it does to a row of logits.

    A subclass is a frozen dataclass whose fields are declared with `emlocal.settings.setting`.
    """

    name: ClassVar[str]
    """What it is called as a method, in results and in evaluations: "em-inf"."""
    flag: ClassVar[str]
    """The flag that switches it on; a batch line's field has the same name: "--em-inf", `em_inf`."""
    help: ClassVar[str]
    """Of that flag."""

    @classmethod
    def field(cls) -> str:
        """The field of a batch line and the key of a config file that switch it on."""
        return cls.flag.removeprefix("--").replace("-", "_")

    @abstractmethod
    def reference(self, z: "Float64") -> Outcome:
        """The step on one row, float64 [V], which is not changed.

        The row is a distribution: no NaN, no +inf; −inf marks masked tokens, which must stay masked.
        """

    @abstractmethod
    def describe(self) -> str:
        """The step and its settings in a few words, for people."""

    def apply(self, logits: "ArrayLike") -> EMResult:
        """The step on each row by itself.

        Args:
            logits: [..., V], any float dtype; −inf marks masked tokens, which stay masked.
        Raises:
            LogitsError: a row with NaN or +inf, or with every token masked.
        """
        import numpy as np

        from emlocal.em.entropy import checked

        z = checked(logits)
        done = [self.reference(row) for row in z.reshape(-1, z.shape[-1])]
        shape = z.shape[:-1]
        return EMResult(
            logits=np.array([each.logits for each in done]).reshape(z.shape),
            entropy_before=np.array([each.entropy_before for each in done]).reshape(shape),
            entropy_after=np.array([each.entropy_after for each in done]).reshape(shape),
            steps=np.array([each.steps for each in done], dtype=np.int64).reshape(shape),
        )


def describe_em(step: EMStep | None) -> str:
    """An EM step in words."""
    return "off" if step is None else step.describe()
