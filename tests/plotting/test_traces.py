"""Traces: reading, the error for each bad file, and drawing."""

import json
from pathlib import Path

import pytest

from emlocal.errors import UsageError
from emlocal.plotting import screen_lines, write_picture
from emlocal.plotting.traces import MOST, MOST_SPELLED, read_traces, show_traces, shown_text
from tests.plotting.data import texts, trace


def test_answers_are_what_was_drawn(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.jsonl", tokens=12, samples=2)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    first, second = read_traces([path])
    assert [first.label, second.label] == ["t.jsonl, answer 1", "t.jsonl, answer 2"]
    mine = [line for line in lines if line["sample"] == 1]
    assert [d.entropy_before for d in second.draws] == [line["entropy_before"] for line in mine]
    assert second.changed == [line["token"] != line["token_without_em"] for line in mine]
    assert any(second.changed)
    assert second.summary.after < second.summary.before


def test_a_picture_names_tokens_and_what_em_did(tmp_path: Path) -> None:
    path = trace(tmp_path / "$x_1$.jsonl")
    (answer,) = read_traces([path])
    write_picture([path], tmp_path / "t.svg")
    found = texts(tmp_path / "t.svg")
    assert {"before EM", "after EM", "another token without EM", "entropy, nats"} <= found
    assert f"$x_1$.jsonl: {answer.describe()}" in found  # not parsed as a formula
    assert "12 tokens" in answer.describe()


@pytest.mark.parametrize("tokens", [1, 70, 71, 300])
def test_pictures_of_any_length(tmp_path: Path, tokens: int) -> None:
    paths = [trace(tmp_path / "a.jsonl", tokens), trace(tmp_path / "b.jsonl", 3, em=False)]
    write_picture(paths, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_more_answers_than_fit_a_picture_are_for_the_terminal(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.jsonl", 2, samples=MOST + 1)
    with pytest.raises(UsageError, match=f"{MOST + 1} answers; a picture shows at most {MOST}"):
        write_picture([path], tmp_path / "t.png")
    shown = "\n".join(line.plain for line in screen_lines([path], 80, colours=False))
    assert f"answer {MOST + 1}" in shown


def test_on_the_terminal_the_answer_has_its_changed_tokens_marked(tmp_path: Path) -> None:
    answers = read_traces([trace(tmp_path / "t.jsonl", 9)])
    legend, _, label, figures, *plot, marks, ends, spelled = show_traces(answers, 80)
    assert "another token without EM" in legend.plain
    assert label.plain == "t.jsonl"
    assert figures.plain == answers[0].describe()
    assert marks.plain.count("▴") == spelled.plain.count("‹") == sum(answers[0].changed) > 0
    assert ends.plain.split() == ["1", "token", "9"]
    top = max(d.entropy_before for d in answers[0].draws)
    assert plot[0].plain.startswith(f"{top:.3g} ┤")


def test_columns_stand_for_several_tokens_where_the_answer_is_longer(tmp_path: Path) -> None:
    answers = read_traces([trace(tmp_path / "t.jsonl", MOST_SPELLED + 1)])
    lines = [line.plain for line in show_traces(answers, 80)]
    assert max(map(len, lines)) <= 80
    assert "(each column is the mean of 6 tokens)" in lines
    assert f"(the texts of more than {MOST_SPELLED} tokens are not shown)" in lines


def test_without_em_there_is_one_entropy(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.jsonl", em=False)
    lines = [line.plain for line in screen_lines([path], 80, colours=False)]
    assert "EM changed nothing" in lines[0]
    assert not any("░" in line or "▴" in line for line in lines)
    write_picture([path], tmp_path / "t.svg")
    assert "before EM" not in texts(tmp_path / "t.svg")


def test_what_a_model_says_cannot_paint_the_terminal() -> None:
    assert shown_text("\x1b[2Ja\nb\tc\ud800") == "\ufffd[2Ja⏎b⇥c?"
    assert shown_text("") == "∅"


def test_a_text_may_hold_line_separators(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.jsonl", 1)
    line = json.loads(path.read_text(encoding="utf-8")) | {"text": "a\u2028b\x85 猫"}
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_traces([path])[0].texts == (line["text"],)
    write_picture([path], tmp_path / "t.png")


def test_damaged_traces_are_named_by_their_line(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.jsonl", 3)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    cases = {
        b"": "is empty",
        whole[:-20]: "cut off: its last line, 3, is incomplete",
        lines[0] + b"{}\n" + lines[2]: "line 2 is not a token",
        whole.replace(b'"steps"', b'"stops"'): "line 1 is not a token",
        lines[0] + lines[2]: "line 2: token 2 of answer 1 comes after 1 token;",
        whole + whole: "line 4: token 0 of answer 1 comes after 3 tokens",
        b"\x7fELF\x00\xff\xfe": "is not a trace: line 1",
        b"[" * 100_000 + b"\n": "is not a trace: line 1",
        lines[0].replace(b'"entropy_before": ', b'"entropy_before": NaN, "x": '): "line 1 is not a token",
    }
    for damaged, says in cases.items():
        path.write_bytes(damaged)
        with pytest.raises(UsageError) as error:
            read_traces([path])
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    path.write_bytes(whole.rstrip(b"\n"))
    assert len(read_traces([path])[0].draws) == 3
    with pytest.raises(UsageError, match="given twice"):
        read_traces([path, path])
