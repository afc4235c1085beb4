"""What is read off logits [B, Y] on the host."""

import numpy as np


def margins(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[B] z_y - max of the others."""
    logits = np.array(logits, np.float64)
    own = logits[np.arange(len(y)), y]
    logits[np.arange(len(y)), y] = -np.inf
    return own - logits.max(axis=1)


def scale(logits: np.ndarray) -> float:
    """What a difference of logits [B, Y] is large against: the spread of the two best scores of all images.

    Scores of classes that are ruled out, at the end of float32 say, would excuse any difference. A hundredth
    of the size keeps a common offset, which only costs digits, from looking like chance.
    """
    best = np.sort(np.asarray(logits, np.float64), axis=1)[:, -2:]
    if not best.size:
        return 1.0
    return float(np.maximum(np.maximum(np.ptp(best), 0.01 * np.abs(best).max()), 1e-12))
