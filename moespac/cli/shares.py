"""Shares of all experts, as people write them."""

from __future__ import annotations

import re

from moespac.errors import ConfigError


def share_of_experts(text: str, flag: str) -> float:
    """25% as 0.25. Raises ConfigError, naming ``flag``, for what is no share above 0% and up to 100%."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None or not 0 < float(match[1]) <= 100:
        raise ConfigError(f"{flag} {text}: is not a share of the experts; give more than 0% and at most 100%")
    return float(match[1]) / 100
