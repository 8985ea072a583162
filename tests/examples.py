"""The number of examples of property tests, and their choice.

`pytest` draws the same examples each time, so that it passes or fails for a reason. The open-ended search is
a separate command:

    pytest --hypothesis-profile=search tests/em tests/sampling tests/settings tests/backends

It draws 40 times as many examples, different ones each time, and takes as long as it needs. It prints a
failure as a call of the test. Add that to the test as an `@example`, so that it is always tried, and then fix
the bug.
"""

from typing import Any

from hypothesis import settings

REPEATABLE, SEARCH = "repeatable", "search"
_MORE = 40


def register() -> None:
    """Registers both profiles and loads the repeatable one. Call it before any property test is imported."""
    settings.register_profile(REPEATABLE, derandomize=True, deadline=None)
    settings.register_profile(SEARCH, derandomize=False, deadline=None, print_blob=True)
    settings.load_profile(REPEATABLE)


def examples(number: int, **more: Any) -> settings:
    """Sets the number of examples; the search draws a multiple of it."""
    found = settings.get_current_profile_name() == SEARCH
    return settings(max_examples=number * (_MORE if found else 1), **more)
