"""Lines, bars and axes in characters."""

from pathlib import Path

import pytest

from emlocal.plotting import Canvas, bar, between, framed, screen_lines, short
from tests.plotting.data import rows, run


def plain(canvas: Canvas) -> list[str]:
    return [row.plain for row in canvas.rows()]


def test_a_line_of_dots_goes_from_corner_to_corner() -> None:
    canvas = Canvas(2, 1)
    canvas.line([(0, 0), (1, 1)], 0)
    assert plain(canvas) == ["⡠⠊"]
    canvas = Canvas(3, 2)
    canvas.line([(0.5, 1)], 0)
    assert "".join(plain(canvas)).strip() in ("⠁", "⠈")


def test_letters_tell_lines_apart_without_colours() -> None:
    canvas = Canvas(5, 3, letters=True)
    canvas.line([(0, 0), (1, 1)], 0)
    canvas.line([(0, 1), (1, 0)], 1)
    top, middle, bottom = plain(canvas)
    assert top[0] == bottom[-1] == "b"
    assert top[-1] == bottom[0] == "a"
    assert middle[2] == "+"


def test_lines_have_colours_of_their_own() -> None:
    canvas = Canvas(4, 1)
    canvas.line([(0, 0), (0.2, 0)], 0)
    canvas.line([(0.9, 0), (1, 0)], 1)
    (row,) = canvas.rows()
    assert len({str(span.style) for span in row.spans if span.style}) == 2


@pytest.mark.parametrize(
    ("share", "drawn"), [(0, "    "), (1, "████"), (0.5, "██  "), (0.28, "█▏  "), (2, "████"), (-1, "    ")]
)
def test_bars_to_an_eighth(share: float, drawn: str) -> None:
    assert bar(share, 4) == drawn


def test_axes() -> None:
    empty = Canvas(12, 3).rows()
    lines = [line.plain for line in framed(empty, 0, 12.345, "0", "step", "99")]
    assert [line[:6] for line in lines] == ["12.3 ┤", "     │", "   0 ┤", "     └", "      "]
    assert lines[-1].split() == ["0", "step", "99"]
    assert between("0", "long middle", "99", 8) == "0     99"
    assert [short(n) for n in (0.21712, 12345.6, 2.5e10, -3)] == ["0.217", "12346", "2.5e+10", "-3"]


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("colours", [True, False])
def test_runs_of_any_width(tmp_path: Path, width: int, colours: bool) -> None:
    folders = [run(tmp_path / name, rows(30, reward=-2.0, kl=0.0)) for name in ("one", "two")]
    lines = [line.plain for line in screen_lines(folders, width, colours=colours)]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for title in ("Entropy of answers, nats per token", "Reward", "KL to the base model", "Repeated text, %"):
        assert title in text
    assert lines[:2] == (["━━ one", "━━ two"] if colours else ["a one", "b two"])


def test_one_run_says_where_it_ended(tmp_path: Path) -> None:
    lines = [line.plain for line in screen_lines([run(tmp_path / "a", rows(4))], 80, colours=False)]
    assert lines[0] == "a"
    assert any("step (last: 0.25)" in line for line in lines)


def test_a_run_of_one_step(tmp_path: Path) -> None:
    assert screen_lines([run(tmp_path / "a", rows(1))], 80, colours=False)
