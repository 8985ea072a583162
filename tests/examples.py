"""How many examples a property test draws, and which.

`pytest` draws the same ones each time, so that it passes or fails for a reason. The open-ended search is a
command of its own:

    pytest --hypothesis-profile=search tests/em tests/sampling tests/settings tests/backends

It draws 40 times as many, other ones each time, and takes as long as it needs. What it finds is printed as a
call of the test; put that beside the test as an `@example`, so that it is always tried, and then fix it.
"""

from typing import Any

from hypothesis import settings

REPEATABLE, SEARCH = "repeatable", "search"
_MORE = 40


def register() -> None:
    """Make both profiles known, and draw repeatable examples. Before any property test is imported."""
    settings.register_profile(REPEATABLE, derandomize=True, deadline=None)
    settings.register_profile(SEARCH, derandomize=False, deadline=None, print_blob=True)
    settings.load_profile(REPEATABLE)


def examples(number: int, **more: Any) -> settings:
    """So many examples; in the search a multiple."""
    found = settings.get_current_profile_name() == SEARCH
    return settings(max_examples=number * (_MORE if found else 1), **more)
