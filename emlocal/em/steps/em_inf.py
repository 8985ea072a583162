"""EM-INF: at each decoding step, descend the entropy of the next-token distribution (paper §4, eq. 5).

The model stays frozen; the logits z of one step are the only parameters. With the original distribution p⁰,

    loss(z) = max(H(softmax z), δ) + κ·KL(p⁰ ‖ softmax z)

and gradient steps run until H ≤ δ, tested *before* each step, or until `steps` are spent. κ = 0 is the
paper's equation; the authors' released code adds the KL term and replaces gradient descent by Adam.

`emlocal.em.fast` is the faster way, which must agree with this.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from emlocal.em import EMStep, Outcome
from emlocal.settings.table import check_settings, setting

if TYPE_CHECKING:
    from emlocal.em.entropy import Float64

# Adam's constants, as torch.optim.Adam and Kingma & Ba (2015) have them.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class EMInf(EMStep):
    """EM-INF and its settings. Raises UsageError, with flag and range, for a value out of range."""

    name: ClassVar[str] = "em-inf"
    flag: ClassVar[str] = "--em-inf"
    help: ClassVar[str] = "Minimise each token's entropy while decoding (EM-INF)."

    threshold: float = setting(
        0.3,
        "--em-threshold",
        0,
        math.inf,
        "Skip tokens whose entropy is already below this, in nats (δ).",
        unit="nats",
    )
    """δ: a row at H ≤ δ is left unchanged. δ = 0 never stops early, δ ≥ log V never starts."""
    steps: int = setting(10, "--em-steps", 0, 1000, "Take at most this many gradient steps per token.")
    learning_rate: float = setting(
        2.0, "--em-learning-rate", 0, 1e6, "Set the size of a gradient step (η).", low_is_open=True
    )
    optimizer: Literal["sgd", "adam"] = setting(
        "sgd", "--em-optimizer", help="Set the optimiser of the gradient steps."
    )
    """sgd is the paper's descent; adam is what the authors' code runs, fresh for every token."""
    kl_weight: float = setting(
        0.0, "--em-kl-weight", 0, 1e6, "Set the weight of KL(original ‖ new) beside the entropy (κ)."
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def keeps_most_probable(self) -> bool:
        """Whether the step is plain descent of the entropy: Adam and the KL term can change the order.

        Proof: a step adds η·f(p) to a token's logit, with f(p) = p (log p + H). f is at most 0 below e^−H and
        grows above it. The largest p is at least e^−H, so no other token's logit rises by more.
        """
        return self.optimizer == "sgd" and self.kl_weight == 0

    def describe(self) -> str:
        kl = f", κ {self.kl_weight:g}" if self.kl_weight else ""
        return f"δ {self.threshold:g}, ≤ {self.steps} steps of {self.learning_rate:g} ({self.optimizer}{kl})"

    def reference(self, z: "Float64") -> Outcome:
        from emlocal.em.entropy import finite

        z = z - z.max()  # keeps the numbers small; a common shift changes neither p nor H
        adam = Adam(z.shape, self.learning_rate) if self.optimizer == "adam" else None
        p0 = before = None
        for step in range(self.steps + 1):
            log_p, p, H = _distribution(z)
            if p0 is None or before is None:
                p0, before = p, H
            if self.threshold >= H or step == self.steps:
                return Outcome(z, before, H, step)
            gradient = -p * (finite(log_p) + H) + self.kl_weight * (p - p0)
            z = z - (adam.step(gradient) if adam else self.learning_rate * gradient)
        raise AssertionError("the loop returns at its last round")


EM_PRESETS: dict[str, tuple[EMInf, dict[str, Any]]] = {
    # The step, and the sampling settings that go with it unless the user sets them.
    "default": (EMInf(), {}),
    # Paper §4: eq. 5, "0.1 < δ < 0.5 works best", "5 to 15 gradient steps are enough", then sample.
    # Its η is not stated; 1 reaches δ within the range on the bench models' logits.
    "paper": (
        EMInf(threshold=0.3, steps=15, learning_rate=1.0),
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    ),
    # The authors' released settings: EM-INF/em_inf_eval.sh, which samples at T = 0.1 afterwards.
    "em-pt": (
        EMInf(threshold=0.3, steps=3, learning_rate=0.1, optimizer="adam", kl_weight=0.05),
        {"temperature": 0.1, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    ),
}


def _distribution(z: "Float64") -> "tuple[Float64, Float64, float]":
    """Returns log p, p and H of one row of logits."""
    import numpy as np

    from emlocal.em.entropy import expected_surprisal

    shifted = z - z.max()
    log_p = shifted - np.log(np.exp(shifted).sum())
    p = np.exp(log_p)
    return log_p, p, float(expected_surprisal(p, log_p))


class Adam:
    """Adam on a vector of parameters, from a new state; the authors' code makes one for every token.

    Its steps are sign-like: the first is η·g/(|g| + ε), so a token moves by ±η however small its gradient,
    until |g| nears ε = 1e-8. Source: Kingma & Ba 2015, algorithm 1.
    """

    def __init__(self, shape: tuple[int, ...], learning_rate: float) -> None:
        import numpy as np

        self.learning_rate = learning_rate
        self.mean = np.zeros(shape)
        self.square = np.zeros(shape)
        self.steps = 0
        self._sqrt = np.sqrt

    def step(self, gradient: "Float64") -> "Float64":
        """Returns what to subtract from the parameters, for this gradient (both of the same shape)."""
        self.steps += 1
        self.mean += (1 - BETA1) * (gradient - self.mean)
        self.square += (1 - BETA2) * (gradient * gradient - self.square)
        size = self.learning_rate / (1 - BETA1**self.steps)
        change: Float64 = size * self.mean / (self.root_mean_square() + EPSILON)
        return change

    def root_mean_square(self) -> "Float64":
        """Returns √v̂: the bias-corrected root mean square of the gradients so far."""
        root: Float64 = self._sqrt(self.square) / math.sqrt(1 - BETA2**self.steps)
        return root
