import subprocess
import sys
from pathlib import Path

import pytest

from emlocal.batch.keys import Keys

REPOSITORY = Path(__file__).parents[2]


def test_add_says_how_often() -> None:
    with Keys() as keys:
        assert [keys.add(key) for key in ("a", "b", "a", "a", "b")] == [1, 1, 2, 3, 2]
        assert len(keys) == 2
        assert "a" in keys
        assert "c" not in keys


def test_what_is_no_string_is_no_member() -> None:
    with Keys() as keys:
        keys.add("1")
        assert 1 not in keys
        assert b"1" not in keys


@pytest.mark.parametrize("key", ["", "\0", "a\0b", "a", "A", "é", "e\u0301", "\ud800", "x" * 1_000_000])
def test_strings_of_every_kind_stay_apart(key: str) -> None:
    others = ["a\0", "a\0c", "á", "E\u0301", "\udc00", "x" * 999_999, " ", "\0\0"]
    with Keys() as keys:
        for other in others:
            keys.add(other)
        assert key not in keys
        assert keys.add(key) == 1
        assert key in keys
        assert len(keys) == len(others) + 1


def test_a_million_members_do_not_grow_the_process() -> None:
    program = """if True:
        from emlocal.batch.keys import Keys
        from tests.batch.writer import peak_bytes
        keys = Keys()
        for number in range(10_000):
            keys.add(f"row-{number}")
        before = peak_bytes()
        for number in range(1_000_000):
            keys.add(f"row-{number}:0123456789abcdef0123456789abcdef")
        assert len(keys) == 1_010_000
        print(peak_bytes() - before)
    """
    grown = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    assert int(grown.stdout) < 10_000_000
