"""The largest whole number that fits, where every try is dear."""

from __future__ import annotations

from collections.abc import Callable


def largest(size: Callable[[int], float], limit: float, cap: int = 65536) -> int:
    """Largest n in 1..cap with size(n) <= limit, for a size that never shrinks; 0 if size(1) is above.

    Guesses along the line through two sizes known, at most eight times the last that fits, so a nearly
    straight size takes few tries; a bent one is halved in.
    """
    known = {1: size(1)}
    if known[1] > limit:
        return 0
    low, high, guess = 1, cap + 1, min(2, cap)
    while high - low > 1:
        known[guess] = size(guess)
        low, high = (guess, high) if known[guess] <= limit else (low, guess)
        other = high if high in known else max(n for n in known if n < low)
        slope = (known[other] - known[low]) / (other - low)
        guess = low + int((limit - known[low]) / slope) if slope > 0 else 2 * low
        if high in known and len(known) > 8:
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1, 8 * low)
    return low
