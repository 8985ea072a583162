from hypothesis import example, given
from hypothesis import strategies as st

from emlocal.generation.sample import TextStream

SMALL = st.text("ab\n", max_size=4)
BYTES = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=20).map(str.encode),
    st.text("ab\n", max_size=40).map(str.encode),
    st.lists(st.sampled_from([b"\xe2\x82\xac", b"\xe2\x82", b"\xf0\x9f", b"\xff", b"a", b"\xc3\xa9"])).map(
        b"".join
    ),
)


def streamed(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], str, str | None]:
    stream = TextStream(stop)
    out = [stream.push(piece) for piece in pieces]
    return out, stream.finish(), stream.stopped_by


def truncated(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Cuts `text` at the stop string that is complete first; of two that end together, at the longer."""
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    if not ends:
        return text, None
    _, start, found = min(ends)
    return text[:start], found


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    at = sorted({min(b, len(data)) for b in borders})
    return [data[i:j] for i, j in zip([0, *at], [*at, len(data)], strict=True)]


@example(b"ab", [1], ("ab", "b"))
@example(b"abc", [1, 2], ("abc", "b"))
@example(b"abc", [], ("abc", "b"))
@example(b"aab", [1, 2], ("ab",))
@example(b"\xf0\x9f\x99\x82", [1, 2, 3], ())
@example(b"\xf0\x9fab", [1, 2], ("a",))
@example(b"\xf0\x9f", [1], ("\ufffd",))
@given(
    BYTES,
    st.lists(st.integers(0, 60), max_size=12),
    st.lists(SMALL.filter(bool), max_size=3).map(tuple),
)
def test_what_is_streamed_is_the_whole_text_up_to_the_first_stop(data, borders, stop) -> None:
    pieces, tail, stopped = streamed(cut(data, borders), stop)
    assert ("".join(pieces) + tail, stopped) == truncated(data.decode(errors="replace"), stop)


@given(BYTES, st.lists(SMALL.filter(bool), min_size=1, max_size=3).map(tuple))
def test_what_was_shown_is_never_part_of_a_stop_string(data, stop) -> None:
    stream = TextStream(stop)
    shown = ""
    for i in range(len(data)):
        shown += stream.push(data[i : i + 1])
        assert not any(s in shown for s in stop)
    if stream.stopped_by is not None:
        assert stream.push(b"more") == ""
        assert stream.finish() == ""


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(("\n\nUser:",))
    assert stream.push(b"hello\n") == "hello"
    assert stream.push(b"\nUs") == ""
    assert stream.push(b"ing") == "\n\nUsing"
    assert stream.push(b"\n\nUser: hi") == ""
    assert stream.stopped_by == "\n\nUser:"


def test_held_text_comes_at_the_end() -> None:
    stream = TextStream(("END",))
    assert stream.push(b"the E") == "the "
    assert stream.push(b"N") == ""
    assert stream.finish() == "EN"
    assert stream.stopped_by is None


def test_characters_appear_once_they_are_whole() -> None:
    assert streamed([b"\xe2", b"\x82", b"\xac!"]) == (["", "", "€!"], "", None)
    assert streamed([b"a\xe2\x82"]) == (["a"], "\ufffd", None)
    assert streamed([b"\xff", b"b"]) == (["\ufffd", "b"], "", None)


def test_overlapping_beginnings() -> None:
    assert streamed([b"a", b"a", b"a", b"b"], ("aab",)) == (["", "", "a", ""], "", "aab")
