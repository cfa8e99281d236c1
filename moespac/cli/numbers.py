"""Lists of whole numbers, as people write them."""

from __future__ import annotations

from moespac.errors import ConfigError


def whole_numbers(text: str, flag: str, what: str, least: int, most: int, example: str) -> list[int]:
    """ "1,5" as [1, 5]. Raises ConfigError, naming ``flag`` and ``what``, for what is no list of such numbers."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number <= most for number in numbers):
        raise ConfigError(
            f'{flag} {text}: give {what} from {least} to {most} with commas between, such as "{example}"'
        )
    return numbers
