"""The chat's commands, driven through a pipe."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from emlocal import console
from emlocal.backends.fake import FakeBackend, Script, hashed, saying
from emlocal.chat.input import PipeReader
from emlocal.chat.repl import HELP, Repl
from emlocal.chat.session import ChatSession
from emlocal.cli.chat import ChatSettings
from emlocal.generation import Scheduler
from emlocal.methods import Chosen


class Chat:
    """A chat on the fake backend, with what it printed."""

    def __init__(self, repl: Repl, out: str, err: str) -> None:
        self.repl, self.out, self.err = repl, out, err


@pytest.fixture
def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> "type[Chat] | object":
    monkeypatch.setenv("EMLOCAL_DATA_DIR", str(tmp_path))

    def run(text: str | bytes, script: Script = hashed, context: int = 4096) -> Chat:
        console.err.cache_clear()
        console.out.cache_clear()
        raw = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        settings = ChatSettings({"seed": 3, "max_tokens": 20, "em_inf": True}, {}, Chosen())
        backend = FakeBackend(script, context=context)
        session = ChatSession(backend, Scheduler(backend, 2))
        repl = Repl(session, settings, PipeReader(), show_entropy=False, quiet=False)
        repl.run()
        captured = capsys.readouterr()
        console.err.cache_clear()
        console.out.cache_clear()
        return Chat(repl, captured.out, captured.err)

    return run


def test_answers_go_to_stdout_and_all_else_to_stderr(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat("hi\n/stats\n/show\n/help\n", saying("Guten Tag"))
    assert done.out == "Guten Tag\n"
    assert "answer 9 tokens" in done.err
    assert "chat: 1 answer, " in done.err
    assert "seed 3" in done.err
    assert done.repl.failures == 0


def test_help_names_every_command(chat) -> None:  # type: ignore[no-untyped-def]
    commands = chat("").repl._commands
    listed = {line.split()[0].removeprefix("/") for line in HELP.splitlines() if line.startswith("/")}
    assert listed | {"load"} == set(commands)
    assert "/load" in HELP


def test_exit_leaves_and_the_rest_is_not_read(chat) -> None:  # type: ignore[no-untyped-def]
    assert chat("a\n/exit\nb\n", saying("x")).out == "x\n"


def test_empty_input_and_blank_lines(chat) -> None:  # type: ignore[no-untyped-def]
    assert chat("").out == ""
    assert chat("\n  \n\n").out == ""


def test_text_between_fences_is_one_message(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat('"""\none\n\ntwo\n"""\n', saying("ok"))
    assert done.repl.session.conversation.exchanges == [("one\n\ntwo", "ok")]


def test_two_slashes_begin_a_message(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat("//etc/passwd?\n", saying("nein"))
    assert done.repl.session.conversation.exchanges == [("/etc/passwd?", "nein")]


def test_unknown_commands_are_counted_and_the_chat_goes_on(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat("/comapre\nhi\n", saying("hallo"))
    assert "did you mean /compare" in done.err
    assert done.out == "hallo\n"
    assert done.repl.failures == 1


@pytest.mark.parametrize(
    "command",
    ["/regen", "/undo", "/compare", "/edit x", "/stats", "/entropy", "/entropy maybe", "/set", "/set temp",
     "/set temp hot", "/set temp -1", "/set nothing 3", "/em loud", "/load /no/such/file", "/set seed -1",
     "/set max-tokens 0", "/set stop ", "/set em-ratio 0.5"],
)  # fmt: skip
def test_commands_that_cannot_be_done_say_so_in_one_line(chat, command: str) -> None:  # type: ignore[no-untyped-def]
    done = chat(f"{command}\n")
    assert done.repl.failures == 1
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    assert done.out == ""


def test_set_changes_what_follows(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat(
        "/set temp 0\n/set --top-k 5\n/set max-tokens 4\n/set stop xyz\nhi\n/show\n", saying("abcdefgh")
    )
    assert done.out == "abcd\n"
    assert "cut off at --max-tokens 4" in done.err
    plan = done.repl.settings.turn().plan
    assert (plan.params.temperature, plan.params.top_k, plan.stop) == (0, 5, ("xyz",))


@pytest.mark.parametrize(
    ("command", "says", "fix"),
    [
        ("temp -1", "error: temp is -1; it must be between 0 and 100\n", ""),
        ("temp hot", 'error: temp is "hot"; it must be a number between 0 and 100\n', ""),
        ("top-k 1.5", "error: top-k is 1.5; it must be a whole number between 0 and 1e+09\n", ""),
        ("em-inf 1", "error: em-inf is 1; it must be true or false\n", ""),
        ("em-optimizer 3", "error: em-optimizer is 3; it must be sgd or adam\n", ""),
        (
            "em-ratio 0.5",
            "error: em-ratio has no effect without adaptive-temp\n",
            "fix: /set adaptive-temp true\n",
        ),
        ("adaptive-temp true", "error: em-inf and adaptive-temp contradict each other", ""),
        ("max-tokens 0", "error: max-tokens is 0; it must be at least 1\n", ""),
    ],
)
def test_what_set_says_can_be_typed_after_it(chat, command: str, says: str, fix: str) -> None:  # type: ignore[no-untyped-def]
    done = chat(f"/set {command}\n")
    assert says in done.err
    assert fix in done.err
    assert "--" not in done.err


def test_no_em_inf_is_em_inf_false_to_set(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat("/em off\n/set em-preset paper\n")
    assert "error: em-inf false and em-preset contradict each other" in done.err


def test_em_on_brings_back_what_em_off_switched_off(chat) -> None:  # type: ignore[no-untyped-def]
    cooler = "/set em-inf false\n/set adaptive-temp true\n/set em-ratio 0.4\n"
    done = chat(f"{cooler}/em on\n/em off\n/em off\n/em on\n/em default\n")
    assert done.repl.failures == 0
    lines = [line for line in done.err.splitlines() if line.startswith("EM:")]
    chosen = "EM: adaptive temperature, α 0.4, δ 0.1"
    assert lines[:4] == [chosen, "EM: off", "EM: off", chosen]
    assert lines[4].startswith("EM: δ 0.3")
    done = chat("/set em-steps 2\n/em off\n/em on\n")
    assert "≤ 2 steps" in done.err.splitlines()[-1]


def test_em_on_without_an_earlier_choice_is_em_inf() -> None:
    settings = ChatSettings({"seed": 3}, {}, Chosen())
    settings.em("on")
    assert settings.em_text().startswith("δ 0.3, ≤ 10 steps of 2")


def test_em_on_brings_back_the_config_files_step() -> None:
    settings = ChatSettings({"seed": 3}, {"adaptive_temp": True}, Chosen())
    before = settings.em_text()
    settings.em("off")
    assert settings.em_text() == "off"
    settings.em("on")
    assert settings.em_text() == before == "adaptive temperature, α 0.5, δ 0.1"


def test_figures_are_those_of_the_answer_and_single_without_em(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat("/em off\nhi\n/em on\n/set seed 9\n/stats\n/entropy\n")
    lines = [line for line in done.err.splitlines() if "entropy " in line and not line.startswith("EM:")]
    assert len(lines) == 2 + 5
    assert lines[0] == lines[1]  # the answer's own line, and /stats
    assert "seed 3" in lines[1]
    assert not any("→" in line for line in lines)


def test_em_on_off_and_presets(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat("/em\n/em off\n/em em-pt\n/em on\n/set em-steps 2\n/em\n")
    lines = [line for line in done.err.splitlines() if line.startswith("EM:")]
    assert lines[1] == "EM: off"
    assert "adam" in lines[2]
    assert "adam" in lines[3]
    assert "≤ 2 steps" in lines[4]
    assert done.repl.failures == 0


def test_compare_shows_both_and_where_they_part(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat("hi\n/compare\n")
    assert done.repl.failures == 0
    assert re.search(r"^EM off: \d+ tokens, entropy \d\.\d\d nats$", done.out, re.M)
    assert re.search(r"^EM on: \d+ tokens, entropy \d\.\d\d → \d\.\d\d nats$", done.out, re.M)
    assert "they differ " in done.err or "the answers are the same" in done.err


def test_undo_edit_and_regen(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat("one\ntwo\n/undo\n/edit uno\n/regen\n", saying("ja"))
    assert done.repl.failures == 0
    assert done.repl.session.conversation.exchanges == [("uno", "ja")]
    assert "removed: two" in done.err


def test_save_and_load_by_name_and_path(chat, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.json"
    done = chat(f"/system be kind\nhi\n/save trip\n/save {path}\n/clear\n/load trip\n", saying("ho"))
    assert done.repl.failures == 0
    assert (tmp_path / "chats" / "trip.json").exists()
    assert path.exists()
    assert done.repl.session.conversation.exchanges == [("hi", "ho")]
    assert done.repl.session.conversation.system == "be kind"


def test_save_without_a_name_never_replaces_another_chat(chat, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    chat("one\n/save\ntwo\n/save\n/clear\nthree\n/save\n", saying("ho"))
    questions = sorted(
        [pair["question"] for pair in json.loads(path.read_text())["exchanges"]]
        for path in (tmp_path / "chats").iterdir()
    )
    assert questions == [["one", "two"], ["three"]]
    again = chat("/load\nfour\n/save\n", saying("ho"))
    assert [question for question, _ in again.repl.session.conversation.exchanges] == ["three", "four"]
    assert len([*(tmp_path / "chats").iterdir()]) == 2


def test_save_says_that_a_file_is_replaced(chat) -> None:  # type: ignore[no-untyped-def]
    first = chat("hi\n/save trip\n/save trip\n", saying("ho"))
    assert "in place of" not in first.err
    assert "trip.json, in place of the file of that name" in chat("hi\n/save trip\n", saying("ho")).err


def test_load_says_what_can_be_loaded(chat) -> None:  # type: ignore[no-untyped-def]
    none = "fix: no chat is saved yet; save one: /save NAME"
    assert none in chat("/load nosuch\n").err
    assert "error: no chat is saved yet" in chat("/load\n").err
    chat("hi\n/save trip\n/save\n/save home\n", saying("ho"))
    assert "fix: load one of the saved chats: home, trip\n" in chat("/load nosuch\n").err


def test_a_full_context_says_what_to_do_and_the_chat_goes_on(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat("x" * 100 + "\nhi\n", saying("ho"), context=64)
    assert "the context holds 64" in done.err
    assert "/clear" in done.err
    assert done.out == "ho\n"


def test_entropy_lists_the_least_certain_tokens(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat("hi\n/entropy\n")
    assert "tokens with the highest entropy" in done.err
    assert done.err.count("entropy ") >= 5
    assert "\x1b" not in done.out


def test_a_line_that_is_not_utf8_is_an_error_and_the_next_is_answered(chat) -> None:  # type: ignore[no-untyped-def]
    for bom in (b"", b"\xef\xbb\xbf"):
        done = chat(bom + b"hi\na\xff\nhi again\n", saying("ho"))
        assert re.search(rf"line 2 of stdin .* 0xff at offset {len(bom) + 4}$", done.err, re.M)
        assert "iconv" in done.err
        assert done.repl.session.conversation.exchanges == [("hi", "ho"), ("hi again", "ho")]
        assert done.repl.failures == 1
    assert "line 1 of stdin is not UTF-8 text: byte 0xff at offset 5" in chat(b"\xef\xbb\xbfhi\xff\n").err
    assert "never ended" in chat('"""\nabc\n').err


def test_a_block_that_is_not_utf8_is_one_error(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat(b'"""\na\n\xff\n/exit\n\xfe\n"""\nhi\n', saying("ho"))
    assert done.repl.failures == 1
    assert "line 3 of stdin" in done.err
    assert done.repl.session.conversation.exchanges == [("hi", "ho")]


def test_methods_are_chosen_and_left(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat(
        "/em off\n/method self-consistency:3\nhow many?\n/method\n/method off\nagain\n",
        saying("it is 7", "yes"),
    )
    assert done.out == "it is 7\nyes\n"
    assert "answer 7 (the last number of its text) · 3 of 3 agree" in done.err
    assert "method: self-consistency:3" in done.err
    assert "method: off" in done.err
    assert done.repl.failures == 0


def test_the_last_question_again_by_a_vote(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat(
        "/vote\nhow many?\n/vote\n/vote 6:wave=6\n/vote x\n/method\n/set temp 0\n/vote\n", saying("it is 7")
    )
    assert done.out == "it is 7\n" * 3
    assert "answer 7 (the last number of its text) · 4 of 4 agree · 4 more samples not needed" in done.err
    assert "6 of 6 agree · confidence 1.00 (the method's own, not calibrated) · seed 3" in done.err
    assert "there is no question yet" in done.err
    assert "after vote: one number is expected" in done.err
    assert "method: off" in done.err
    assert "greedy samples are all alike and cannot vote" in done.err
    assert done.repl.failures == 3
    assert done.repl.session.conversation.exchanges == [("how many?", "it is 7")]


def test_a_method_that_contradicts_the_settings_is_refused(chat) -> None:  # type: ignore[no-untyped-def]
    done = chat("/method greedy\n/method sample:9999\n/method\n")  # EM is on
    assert "--method greedy and the EM flags contradict each other" in done.err
    assert done.repl.failures == 2
    assert "method: off" in done.err
