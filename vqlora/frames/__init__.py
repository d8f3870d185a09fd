"""Frames of videos: read them (`reader`), score them (`scores`), select some (`select`, `api`)."""
from __future__ import annotations

from typing import Any

_FROM_API = ("POLICIES", "score_video", "select_frames", "selection")
__all__ = list(_FROM_API)


def __getattr__(name: str) -> Any:
    """The names of `api`, imported on first use: the workers of a decode need none of it."""
    if name in _FROM_API:
        from vqlora.frames import api
        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
