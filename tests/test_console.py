"""Progress: a bar on a terminal, and occasional lines elsewhere."""

import re
from collections.abc import Callable, Iterator

import pytest
from rich.text import Text

from emlocal import console
from emlocal.errors import EmlocalError


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Makes new consoles, because a console remembers whether it writes to a terminal."""
    for stream in (console.err, console.out):
        stream.cache_clear()
    yield
    for stream in (console.err, console.out):
        stream.cache_clear()


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
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
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


HOSTILE = "a\x1b]0;title\x07b\x9b31m\rc\ud800d\te\n\x08f é 你"


@pytest.mark.parametrize(
    "say",
    [
        console.note,
        console.warn,
        console.heading,
        lambda text: console.report(EmlocalError(text)),
        lambda text: console.report(EmlocalError("x", text)),
        lambda text: console.pairs([("name", text)]),
        lambda text: console.pairs([(text, "value")]),
        lambda text: console.err().print(text, markup=False),
        lambda text: console.out().print(Text(text)),
    ],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_no_message_carries_an_escape_code(
    say: Callable[[str], None],
    terminal: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "100")
    say(HOSTILE)
    said = "".join(capsys.readouterr())
    own = re.compile(r"\x1b\[[0-9;]*m")  # colours that rich adds
    bare = own.sub("", said)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", bare)
    assert "title" in bare
    if not terminal:
        assert not own.search(said)
        assert "a�]0;title" in bare


def test_a_bar_carries_no_escape_code_of_a_label(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with console.progress() as progress:
        progress("fetching \x1b]0;title\x07", 49_000_000, 98_000_000)
    drawn = capsys.readouterr().err
    assert "fetching �]0;tit" in drawn
    assert "\x1b]" not in drawn


def test_tokens_are_counted_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.working("answering") as tick:
        tick()  # at first there is nothing to say
    monkeypatch.setattr(console, "_PLAIN_SECONDS", 0.0)
    with console.working("answering") as tick:
        for _ in range(2):
            tick()
    with console.working("answering", quiet=True) as tick:
        tick()
    assert capsys.readouterr().err == "answering: 1 token\nanswering: 2 tokens\n"


def test_a_count_in_a_pipe_says_what_it_counts_and_where_it_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.counting(40, label="greedy") as show:
        for done in range(0, 41, 8):
            now += 3.0
            show(done, "")
    with console.counting(None) as show:  # ends before the first line is due
        show(1, "35 tok/s")
        now += 5.0
        show(2, "35 tok/s")
    expected = "greedy: 8 of 40\ngreedy: 24 of 40\ngreedy: 40 of 40\n2, 35 tok/s\n"
    assert capsys.readouterr().err == expected
