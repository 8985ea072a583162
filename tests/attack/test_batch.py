"""Batches under attack: names, links, descriptors, deep JSON, tight limits."""

import pytest

from emlocal.batch.keys import Keys
from tests.batch.batches import batch, rows


def name_of(prompt: str) -> str:
    """The name that a line of this content gets."""
    (only,) = rows([{"prompt": prompt}])
    return str(only["custom_id"])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_a_given_name_that_is_the_hash_of_the_content(order: tuple[int, ...]) -> None:
    """Each line has its row, whichever comes first, and a second run finds them all."""
    own = name_of("hello")
    lines = [{"prompt": "hello"}, {"custom_id": own, "prompt": "hello"}, {"prompt": "after"}]
    asked = [lines[i] for i in order]
    found = rows(asked)
    assert len({row["key"] for row in found}) == 3
    assert not any("error" in row for row in found)
    with Keys() as done:
        for row in found:
            done.add(row["key"])
        again = batch(asked, done=done)
        assert list(again.rows()) == []
        assert again.tally.skipped == 3


def test_the_second_of_one_given_name_is_still_an_error() -> None:
    own = name_of("hello")
    named = {"custom_id": own, "prompt": "hello"}
    found = rows([{"prompt": "hello"}, named, named, {"prompt": "hello"}])
    assert len({row["key"] for row in found}) == 4
    assert sum("error" in row for row in found) == 1


def test_keys_are_those_of_earlier_versions() -> None:
    """Recorded from version 863f4ab: an output that it began goes on."""
    lines = [
        {"prompt": "hello"},
        {"custom_id": "a", "prompt": "hello"},
        {"prompt": "hello"},
        {"custom_id": "a", "prompt": "x"},
    ]
    assert {row["key"] for row in rows(lines)} == RECORDED


RECORDED = {
    "d227543a67e4b6e351b0d64a1465a2fc",
    "d8dc5fba1b3e8af241841761a55d9a37",
    "e56c6f756250129a653863db0cc8c6eb",
    "f606327910593e91a3f63f06a682e224",
}
