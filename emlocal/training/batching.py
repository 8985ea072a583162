"""Micro-batches: rollouts of similar length together, each batch within a budget of tokens."""

from collections.abc import Sequence

from emlocal.training.rollouts import Rollout
from emlocal.training.settings import Normalize


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches whose padded size, number × longest, is within `budget` tokens.

    A single one that is longer has a batch to itself. Each index occurs once; the longest come first, so
    that what does not fit into memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def token_weights(rollouts: Sequence[Rollout], normalize: Normalize) -> list[float]:
    """The weight of each rollout's tokens in the step's loss.

    token: 1 / all tokens, so that each counts alike, however they are cut into micro-batches. sequence:
    1 / rollouts, the paper's eq. 2: a sum over the tokens, a mean over the answers.
    """
    if normalize == "sequence":
        return [1 / len(rollouts)] * len(rollouts)
    return [1 / sum(len(r.answer) for r in rollouts)] * len(rollouts)
