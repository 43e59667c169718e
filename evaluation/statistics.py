"""Statistics of scores that come in pairs of the same prompt and noise."""

import numpy as np
import torch

TIE = 1e-6
"""Scores that differ by no more are a tie: rounding, when two models draw the same picture."""


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Mean of (P, N) values, N of each of P prompts, and its standard error, None where N is 1.

    The prompts are taken as they are: the error is that of the prompts' means, added up. So it
    says how far the figure would move with other noise and the same prompts.
    """
    P, N = values.shape
    values = values.astype(np.float64)
    error = float(np.sqrt((values.var(axis=1, ddof=1) / N).sum()) / P) if N > 1 else None
    return float(values.mean()), error


def compare(
    scores: np.ndarray, base: np.ndarray | None, of_a_set: bool = False
) -> dict[str, float | None]:
    """The figures of (P, N) scores, and of their pairs with those of the base, of the same noise.

    `of_a_set`: a prompt's pictures have one score together, which has no standard error.
    """
    out = dict(zip(("mean", "standard_error"), mean_and_error(scores)))
    if base is not None:
        # float32 may have no number for the difference of two large scores.
        gain = scores.astype(np.float64) - base
        won = (gain > TIE) + 0.5 * (abs(gain) <= TIE)
        out |= dict(zip(("gain", "gain_standard_error"), mean_and_error(gain)))
        out |= dict(zip(("win_rate", "win_rate_standard_error"), mean_and_error(won)))
    if of_a_set:
        out |= {key: None for key in out if key.endswith("standard_error")}
    return out


def diversity(vectors: torch.Tensor) -> float | None:
    """Mean over all pairs of N vectors (N, D) of the root mean square of their difference.

    None for N = 1.
    """
    if len(vectors) < 2:
        return None
    return torch.pdist(vectors).mean().item() / vectors.shape[1] ** 0.5
