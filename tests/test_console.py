"""Progress: a bar where there is a terminal, now and then a line where there is none."""

from collections.abc import Iterator

import pytest

from emlocal import console


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Consoles keep whether they write to a terminal."""
    console.err.cache_clear()
    yield
    console.err.cache_clear()


def test_lines_are_rare_for_each_thing_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress() as progress:
        for done in (0, 1_000_000, 98_000_000):
            progress("fetching a [b]", done, 98_000_000)
        progress("checking", 5_000, None)
    assert capsys.readouterr().err == "fetching a [b] 0 bytes of 98 MB\nchecking 5 kB\n"


def test_lines_are_rare_for_all_that_is_not_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.progress() as progress:
        progress("round 1", 0, None)
        progress("round 2", 0, None)
    assert capsys.readouterr().err == "round 1\n"
    monkeypatch.setattr(console, "_PLAIN_SECONDS", 0.0)
    with console.progress() as progress:
        progress("round 1", 0, None)
        progress("round 2", 0, None)
    assert capsys.readouterr().err == "round 1\nround 2\n"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(quiet=True) as progress:
        progress("fetching", 1, 2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_amounts_only_where_there_are_any(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes that for a terminal
    monkeypatch.setenv("COLUMNS", "100")
    with console.progress() as progress:
        progress("fetching a [b]", 49_000_000, 98_000_000)
    drawn = capsys.readouterr().err
    assert "fetching a [b]" in drawn
    assert "49.0/98.0 MB" in drawn
    with console.progress() as progress:
        progress("waiting", 0, None)
    drawn = capsys.readouterr().err
    assert "waiting" in drawn
    assert "bytes" not in drawn
