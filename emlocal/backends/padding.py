"""A micro-batch of answers as one rectangle, for engines that train."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from emlocal.backends.learner import Answer


def padded(batch: Sequence[Answer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids int64 [B, L], and bool [B, L]: whether that position predicts a token of the answer.

    Position t predicts token t + 1. So an answer's first token is predicted at the prompt's last, and its
    last token (the end token, where there is one) is not fed at all. Padding is on the right.
    """
    longest = max(len(each.prompt) + len(each.answer) - 1 for each in batch)
    tokens = np.zeros((len(batch), longest), dtype=np.int64)
    predicts = np.zeros((len(batch), longest), dtype=np.bool_)
    for i, each in enumerate(batch):
        fed = (*each.prompt, *each.answer[:-1])
        tokens[i, : len(fed)] = fed
        predicts[i, len(each.prompt) - 1 : len(fed)] = True
    return tokens, predicts
