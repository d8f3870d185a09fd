"""Settings of one run from what its experiment sets and what a profile overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vqlora.config import RunSettings
from vqlora.settings_file import ConfigError, parse


def overridden(chosen: Mapping[str, Any], overrides: Mapping[str, Any]) -> RunSettings:
    """The run. Raises ValueError, in one line, for an override of what is chosen or one not allowed."""
    for key in overrides:
        if key in chosen:
            raise ValueError(f"overrides: {key!r} is set by the experiment itself")
    try:
        return parse(RunSettings, {**chosen, **overrides}, "overrides")
    except ConfigError as fault:
        raise ValueError(str(fault).splitlines()[0]) from None
