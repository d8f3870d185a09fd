"""The largest whole number that fits, where every try is dear."""

from __future__ import annotations

from collections.abc import Callable


def largest(size: Callable[[int], float], limit: float, cap: int = 65536) -> int:
    """Largest n in 1..cap with size(n) <= limit, for a size that grows with n; 0 if size(1) is above.

    Guesses along the line through the two nearest sizes known, so a nearly straight size takes few tries.
    """
    known = {1: size(1)}
    if known[1] > limit:
        return 0
    low, high = 1, cap + 1
    guess = 2
    while high - low > 1:
        known[guess] = size(guess)
        low, high = (guess, high) if known[guess] <= limit else (low, guess)
        one, two = sorted(known, key=lambda n: (abs(n - guess), n))[:2] if high > cap else (low, high)
        slope = (known[two] - known[one]) / (two - one)
        guess = low + int((limit - known[low]) / slope) if slope > 0 else 2 * low
        guess = min(max(guess, low + 1), high - 1, cap)
    return low
