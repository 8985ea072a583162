"""The layout of answers on a terminal."""

import io
import itertools
import os
import re
import shutil
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal import console
from emlocal.rendering import AnswerWriter, legend


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def laid_out(pieces: list[str], columns: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        terminal = Terminal()
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
        writer = AnswerWriter(show_entropy=False)
        for piece in pieces:
            writer.piece(piece, 0.0)
        writer.end()
        return terminal.getvalue()


def test_words_go_to_the_next_line_whole() -> None:
    assert laid_out(["one two", " thr", "ee four"], 10) == "one two \nthree four\n"


def test_lines_that_are_exactly_full() -> None:
    assert laid_out(["abcd efgh ijkl"], 9) == "abcd efgh\nijkl\n"


def test_words_longer_than_the_line_and_wide_characters() -> None:
    assert laid_out(["x" * 25 + " y"], 10) == "x" * 25 + " y\n"
    assert laid_out(["日本語 日本語"], 9) == "日本語 \n日本語\n"


def test_controls_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in laid_out(["a\x1b]0;owned\x07b \x9b31mred"], 40)


@given(st.lists(st.text("ab \n\t日"), max_size=12), st.integers(4, 30))
def test_nothing_but_white_space_changes(pieces: list[str], columns: int) -> None:
    assert laid_out(pieces, columns).split() == "".join(pieces).split()


@given(st.text("abc  \n", max_size=120), st.lists(st.integers(0, 120)), st.integers(8, 30))
def test_the_layout_does_not_depend_on_the_pieces(text: str, cuts: list[int], columns: int) -> None:
    borders = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    assert laid_out(pieces, columns).split("\n") == laid_out([text], columns).split("\n")


def test_the_legend_has_colours_and_no_escape_code_as_text() -> None:
    """Consoles show escape codes as replaced characters, so colours must be styles."""
    with pytest.MonkeyPatch.context() as patch:
        console.err.cache_clear()
        terminal = Terminal()
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm-256color")
        patch.delenv("NO_COLOR", raising=False)
        console.err().print(legend())
        said = terminal.getvalue()
    console.err.cache_clear()
    assert "\x1b[38;5;203m" in said
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)
    assert plain == "entropy before EM:  ≤ 0.1  ≤ 0.5  ≤ 1  ≤ 2  > 2 nats\n"
