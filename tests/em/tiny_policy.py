"""An enumerable language model: 5 tokens, answers of 3, logits from a table."""

from collections.abc import Callable
from itertools import product

import numpy as np

from emlocal.em.entropy import entropy, log_softmax
from emlocal.em.losses import PolicyObjective, averaging_weights, log_prob_gradient, policy_loss
from emlocal.em.rewards import Float64, self_certainty

V, LENGTH = 5, 3
ANSWERS = np.array(list(product(range(V), repeat=LENGTH)))
"""[125, 3]: every answer."""
COUNT = len(ANSWERS)
PLACES = np.arange(LENGTH)[None, :].repeat(COUNT, axis=0)
BEFORE = np.concatenate([np.zeros((COUNT, 1), np.int64), ANSWERS[:, :-1]], axis=1)
"""[125, 3]: the token before each; 0 before the first."""


def table(seed: int = 0) -> Float64:
    """Returns the parameters: logits [place, token before, token]."""
    return 1.2 * np.random.default_rng(seed).standard_normal((LENGTH, V, V))


def log_probs(theta: Float64) -> Float64:
    """Returns log-probabilities of every answer's tokens, [125, 3]."""
    return log_softmax(theta)[PLACES, BEFORE, ANSWERS]


def entropies(theta: Float64) -> Float64:
    """Returns entropies at every answer's tokens, [125, 3]."""
    return entropy(theta)[PLACES, BEFORE]


def certainties(theta: Float64) -> Float64:
    """Returns self-certainties at every answer's tokens, [125, 3]."""
    rows = self_certainty(theta.reshape(-1, V)).reshape(LENGTH, V)
    return rows[PLACES, BEFORE]


def probabilities(theta: Float64) -> Float64:
    """Returns probabilities of the answers, [125]."""
    return np.exp(log_probs(theta).sum(axis=1))


def scores(theta: Float64) -> Float64:
    """Returns ∂ log π(y_t | y_<t) / ∂θ, [125, 3, *θ]."""
    log_p = log_softmax(theta)
    found = np.zeros((COUNT, LENGTH, *theta.shape))
    for i, t in np.ndindex(COUNT, LENGTH):
        row = (PLACES[i, t], BEFORE[i, t])
        found[i, t][row] = log_prob_gradient(log_p[row], ANSWERS[i, t])
    return found


def slope_of(f: Callable[[Float64], float], theta: Float64) -> Float64:
    """Returns ∂f/∂θ by central differences."""
    found = np.zeros(theta.shape)
    for index in np.ndindex(theta.shape):
        step = np.zeros(theta.shape)
        step[index] = 1e-5
        found[index] = (f(theta + step) - f(theta - step)) / 2e-5
    return found


def exact_gradient(theta: Float64, rewards: Float64) -> Float64:
    """Returns ∂/∂θ Σ_y π_θ(y) R(y) with R, [125], held constant."""
    return slope_of(lambda at: float(probabilities(at) @ rewards), theta)


def expected_estimate(
    theta: Float64,
    groups: Float64,
    advantages: Float64,
    objective: PolicyObjective = PolicyObjective("reinforce"),
) -> Float64:
    """Returns the mean of the policy-gradient estimate over all groups [K, N] of independently drawn answers.

    `advantages`: [K, N]. The result points uphill.
    """
    count, n = groups.shape
    tokens = log_probs(theta)[groups].reshape(-1)
    terms = policy_loss(tokens, advantages.reshape(-1).repeat(LENGTH), objective, old=tokens)
    weighted = terms.slope.reshape(count, -1) * averaging_weights([LENGTH] * n, "sum")
    chances = probabilities(theta)[groups].prod(axis=1)
    of_answers = np.zeros((COUNT, LENGTH))
    np.add.at(of_answers, groups, (chances[:, None] * weighted).reshape(count, n, LENGTH))
    return -np.tensordot(of_answers, scores(theta), axes=2)


def all_groups(n: int) -> Float64:
    """Returns indices of answers for all groups, [125^n, n]."""
    return np.array(list(product(range(COUNT), repeat=n)))
