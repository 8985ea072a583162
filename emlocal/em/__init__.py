"""The method: entropy minimization (EM), in numpy. It deals with distributions, not with tokens or text.

This module defines an EM step. Each step is one file in `emlocal.em.steps`, with its settings and its
reference. The reference works on the whole vocabulary in float64 and is written to be read beside the paper
(Agarwal et al. 2025, arXiv 2505.15134). A step with these two runs on every engine. Faster ways (`fast`, the
compiled sampler, torch's and mlx's kernels) are chosen by the step's type if they exist, and are tested
against the reference.

This module does not import numpy: `emlocal --help` needs the settings of a step and must be quick.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from emlocal.em.entropy import Float64


class Outcome(NamedTuple):
    """The result of an EM step on one row."""

    logits: "Float64"
    """[V]; only differences mean anything."""
    entropy_before: float
    """Nats."""
    entropy_after: float
    steps: int
    """EM steps taken; 0 if the row was left unchanged."""


@dataclass(frozen=True)
class EMResult:
    """The result of an EM step on rows of shape [..., V]."""

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
    """A step of the sampler that lowers the entropy of a row of logits, with its settings.

    A subclass is a frozen dataclass whose fields are declared with `emlocal.settings.setting`.
    """

    name: ClassVar[str]
    """The step's name as a method, in results and in evaluations: "em-inf"."""
    flag: ClassVar[str]
    """The flag that switches the step on: "--em-inf". A batch line's field has the same name: `em_inf`."""
    help: ClassVar[str]
    """The flag's help text."""

    @classmethod
    def field(cls) -> str:
        """Returns the field of a batch line and the key of a config file that switch the step on."""
        return cls.flag.removeprefix("--").replace("-", "_")

    @abstractmethod
    def reference(self, z: "Float64") -> Outcome:
        """Takes the step on one row, float64 [V], which is not changed.

        The row is a distribution: no NaN, no +inf. −inf marks masked tokens, which must stay masked.
        """

    @property
    def keeps_most_probable(self) -> bool:
        """Whether each row's most probable token stays so, and greedy decoding does not change.

        True only where that is proven; False only means that nobody has shown it.
        """
        return False

    @abstractmethod
    def describe(self) -> str:
        """Returns the step and its settings in a few words, for people."""

    def apply(self, logits: "ArrayLike") -> EMResult:
        """Takes the step on each row by itself.

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
    """Returns an EM step in words; "off" for None."""
    return "off" if step is None else step.describe()
