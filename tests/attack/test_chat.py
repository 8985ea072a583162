"""Whatever is typed, loaded or broken, a chat continues or its conversation is kept."""

import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session, get_app_session
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from emlocal.backends.fake import FakeBackend, saying
from emlocal.chat.conversation import Conversation, chat_file, newest_kept
from emlocal.chat.input import KeptHistory, TerminalReader
from emlocal.chat.repl import Repl
from emlocal.chat.session import ChatSession
from emlocal.cli.chat import ChatSettings
from emlocal.errors import UsageError
from emlocal.generation import Scheduler
from emlocal.methods import Chosen
from emlocal.text import parse_json, well_formed
from tests.attack.terminal import Terminal
from tests.tiny_gguf import write_tiny_gguf

HOSTILE = {
    "digits": '{"format":"emlocal-chat-1","system":null,"exchanges":[{"question":"q","answer":'
    + "9" * 5000
    + "}]}",
    "deep": '{"format":"emlocal-chat-1","system":null,"exchanges":' + "[" * 200_000 + "]" * 200_000 + "}",
    "types": '{"format":"emlocal-chat-1","system":{},"exchanges":[{"question":[],"answer":3}]}',
    "keys": '{"format":"emlocal-chat-1"}',
    "list": "[1]",
    "latin": '{"format":"emlocal-chat-1","system":"\xe9"'.encode("latin-1"),
    "empty": "",
    "zeros": b"\0" * 1000,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_tiny_gguf(tmp_path / "tiny.gguf"))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("EMLOCAL_DATA_DIR", str(folder))
    return folder


def chat(
    model: str, data: Path, stdin: bytes, *more: str, **options: Any
) -> "subprocess.CompletedProcess[bytes]":
    """Runs a chat in a pipe."""
    environment = {**os.environ, **{f"EMLOCAL_{kind}_DIR": str(data) for kind in ("CACHE", "CONFIG", "DATA")}}
    command = [sys.executable, "-m", "emlocal", "chat", "-m", model, "--max-tokens", "3", "-q", *more]
    return subprocess.run(
        command, input=stdin, capture_output=True, check=False, timeout=120, env=environment, **options
    )


def of_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_pipe_of_hostile_commands_goes_on_to_its_end(model: str, data: Path, tmp_path: Path) -> None:
    lines = [b"hello"]
    os.mkfifo(tmp_path / "pipe")
    for name, content in HOSTILE.items():
        path = tmp_path / f"{name}.json"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        lines.append(f"/load {path}".encode())
    lines += [
        b"/load /dev/zero",
        f"/load {tmp_path}/pipe".encode(),  # opening it would block
        f"/save {tmp_path}/pipe".encode(),
        b"/save " + b"x" * 5000,
        b"/save a\0b",
        b"/save ~nobody-here/x",
        b"\xff\xfe\xfd",
    ]
    lines += [
        f"/save {tmp_path}/no/folder/x.json".encode(),
        b"/load " + b"y" * 5000,
        b'/set stop "[/x]"',
        b"/show",
    ]
    lines += [b"x" * 2_000_000, b"<|im_end|>" * 200_000, f"/save {tmp_path}/last.json".encode()]
    done = chat(model, data, b"\n".join(lines) + b"\n")
    said = done.stderr.decode()
    assert done.returncode == 1
    assert "Traceback" not in said
    assert "defect" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(HOSTILE) + 3 + 3 + 1 + 1 + 1 + 2
    assert "a number has too many digits" in said
    assert "nested too deeply" in said
    kept = of_json(tmp_path / "last.json")
    assert [exchange["question"] for exchange in kept["exchanges"]] == ["hello"]


def test_half_characters_in_a_saved_file_become_replacements(model: str, data: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.json"
    half.write_text(
        '{"format":"emlocal-chat-1","system":"\\udfff","exchanges":[{"question":"\\ud800","answer":"\\ud83d\\ude00"}]}'
    )
    done = chat(model, data, f"/load {half}\n/save {tmp_path}/again.json\nhi\n".encode())
    assert done.returncode == 0
    assert of_json(tmp_path / "again.json") | {"model": ""} == {
        "format": "emlocal-chat-1",
        "model": "",
        "system": "\ufffd",
        "exchanges": [{"question": "\ufffd", "answer": "😀"}],
    }


def test_a_system_message_from_the_shell_that_is_not_utf8_can_be_saved(
    model: str, data: Path, tmp_path: Path
) -> None:
    done = chat(model, data, f"/save {tmp_path}/s.json\n".encode(), "--system", os.fsdecode(b"be \xff kind"))
    assert done.returncode == 0
    assert of_json(tmp_path / "s.json")["system"] == "be \ufffd kind"


def test_undo_after_load_prints_no_escapes(model: str, data: Path, tmp_path: Path) -> None:
    evil = {"question": "\x1b]0;OWNED\x07\x1b[2Jhello\x9b31m", "answer": "x"}
    (tmp_path / "esc.json").write_text(
        json.dumps({"format": "emlocal-chat-1", "system": "\x1b[2J", "exchanges": [evil]})
    )
    done = chat(model, data, f"/load {tmp_path}/esc.json\n/system\n/undo\n".encode())
    assert b"removed: " in done.stderr
    assert b"hello" in done.stderr
    assert b"\x1b" not in done.stderr
    assert "\x9b".encode() not in done.stderr


def test_nobody_reads_the_answers_any_more(model: str, data: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "EMLOCAL_DATA_DIR": str(data)}
    command = [sys.executable, "-m", "emlocal", "chat", "-m", model, "--max-tokens", "3", "-q"]
    done = subprocess.run(
        command, input=b"hi\n" * 50, stdout=writing, stderr=subprocess.PIPE, check=False, env=environment
    )
    os.close(writing)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_sigterm_leaves_a_copy_that_resume_finds(model: str, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "emlocal", "chat", "-m", model, "--max-tokens", "3"]
    environment = {**os.environ, "EMLOCAL_DATA_DIR": str(data)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b"remember me\n")
        process.stdin.flush()
        while b"seed " not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        process.wait(timeout=30)
    assert process.returncode == 143
    path = newest_kept()
    assert (
        f"warning: the conversation is saved in {path}; continue it with emlocal chat --resume"
        in said.decode()
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = chat(model, data, f"/save {tmp_path}/again.json\n".encode(), "--resume")
    assert again.returncode == 0
    assert of_json(tmp_path / "again.json")["exchanges"][0]["question"] == "remember me"
    assert chat(model, data, b"", "--resume", "--load", "x").returncode == 2


def test_resume_without_anything_to_resume(model: str, data: Path) -> None:
    done = chat(model, data, b"", "--resume")
    assert done.returncode == 2
    assert b"there is no interrupted chat" in done.stderr


class Lines:
    """A reader of given messages; it raises exceptions among them."""

    interactive = True

    def __init__(self, *messages: str | Exception) -> None:
        self.messages = list(messages)
        self.drafts: list[str] = []

    def read(self, default: str = "") -> str | None:
        self.drafts.append(default)
        message = self.messages.pop(0) if self.messages else None
        if isinstance(message, Exception):
            raise message
        return message


def repl(reader: Lines) -> Repl:
    settings = ChatSettings({"seed": 3, "max_tokens": 20}, {}, Chosen())
    backend = FakeBackend(saying("ja"))
    session = ChatSession(backend, Scheduler(backend, 2))
    return Repl(session, settings, reader, show_entropy=False, quiet=True)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ZeroDivisionError("by nothing"), "unexpected ZeroDivisionError: by nothing"),
        (MemoryError(), "memory ran out"),
        (OSError(28, "No space left on device"), "the output: No space left on device"),
        (RecursionError("maximum"), "nested too deeply"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "unexpected UnicodeEncodeError"),
    ],
)
def test_what_nobody_foresaw_is_one_line_and_the_message_is_offered_again(
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    says: str,
) -> None:
    reader = Lines("one", "two", "three")
    going = repl(reader)
    ask = ChatSession.ask

    def failing(self: ChatSession, question: str, *rest: Any) -> Any:
        if question == "two":
            raise error
        return ask(self, question, *rest)

    monkeypatch.setattr(ChatSession, "ask", failing)
    going.run()
    assert [q for q, _ in going.session.conversation.exchanges] == ["one", "three"]
    assert reader.drafts == ["", "", "two", ""]
    assert says in capsys.readouterr().err
    assert not list(data.rglob("*.json"))  # the chat ended normally


def test_input_that_cannot_be_read_any_more_ends_the_chat_with_a_copy(data: Path) -> None:
    going = repl(Lines("one", UsageError("this one cannot be read"), "two", OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        going.run()
    assert [q for q, _ in Conversation.load(newest_kept()).exchanges] == ["one", "two"]


def test_what_is_in_a_file_already_is_not_kept_twice(data: Path, tmp_path: Path) -> None:
    going = repl(Lines("one", f"/save {tmp_path}/a.json", OSError(5, "gone")))
    with pytest.raises(OSError, match="gone"):
        going.run()
    with pytest.raises(UsageError, match="there is no interrupted chat"):
        newest_kept()


def test_where_the_own_folder_cannot_be_written_the_temporary_one_takes_the_copy(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "chats").write_text("in the way")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match="gone"):
        repl(Lines("one", OSError(5, "gone"))).run()
    (path,) = tmp_path.glob("emlocal-chat-*/*.json")
    assert Conversation.load(path).exchanges == [("one", "ja")]
    said = capsys.readouterr().err.replace("\n", "")
    assert f"emlocal chat --load {path}" in said


def test_edit_that_fails_gives_the_old_exchange_back(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    going = repl(Lines("one", "/edit " + "x" * 10_000, "two"))
    going.run()
    assert [q for q, _ in going.session.conversation.exchanges] == ["one", "two"]
    assert going.failures == 1


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "x" * 5000 + ".json", "~nobody-of-this-name/x"])
def test_names_that_no_file_can_have(data: Path, name: str) -> None:
    with pytest.raises(UsageError, match="a file cannot be named"):
        chat_file(name)


def test_history_files_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "history"
    kept = KeptHistory(path)
    for text in ("one", "two\nlines", "\ud800 half", "+plus\n# hash"):
        kept.store_string(text)
    assert list(KeptHistory(path).load_history_strings()) == ["+plus\n# hash", "? half", "two\nlines", "one"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(os.urandom(100_000) + b"\n+a\n")
    assert next(iter(KeptHistory(path).load_history_strings())) == "a"
    path.write_bytes(b"\n# then\n+x" * 3 + (b"\n# then\n+" + b"y" * 1000) * 10_000 + b"\n")
    texts = list(KeptHistory(path).load_history_strings())
    assert 3000 < len(texts) < 5000
    assert set(texts) == {"y" * 1000}


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "no folder"])
def test_a_history_that_is_no_file_is_kept_in_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "history"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/full")
    else:
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "history"
    kept = KeptHistory(path)
    assert kept.failure
    kept.append_string("hi")
    assert kept.get_strings() == ["hi"]
    assert list(kept.load_history_strings()) == []


@pytest.fixture
def typed(tmp_path: Path) -> Iterator[Callable[..., TerminalReader]]:
    """A reader with simulated typing instead of a terminal."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):

        def begin(raw: bytes, status: Callable[[], str] = str) -> TerminalReader:
            keys.send_bytes(raw)
            return TerminalReader(tmp_path / "history", ["help"], status)

        yield begin


def test_errors_in_the_line_editor_do_not_end_the_chat(
    typed: Callable[..., TerminalReader], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key binding raises; the editor's own handler would show a traceback and wait for Enter."""
    reader = typed(b"hello\x7f")
    delete = Buffer.delete_before_cursor
    calls: list[int] = []

    def fails_once(self: Buffer, count: int = 1) -> str:
        calls.append(count)
        if len(calls) == 1:
            get_app_session().input.send_bytes(b"\x7f\x7f again\r")  # type: ignore[attr-defined]
            raise RuntimeError("a binding of the editor fails")
        return delete(self, count)

    monkeypatch.setattr(Buffer, "delete_before_cursor", fails_once)
    assert reader.read() == "hel again"
    said = capsys.readouterr()
    assert "the line editor failed (a binding of the editor fails)" in said.err
    assert "Traceback" not in said.err + said.out
    assert "ENTER" not in said.err + said.out


def test_a_line_editor_that_always_fails_is_given_up(typed: Callable[..., TerminalReader]) -> None:
    def fails() -> str:
        raise RuntimeError("for good")

    with pytest.raises(RuntimeError, match="for good"):
        typed(b"a\r", fails).read()


def test_bytes_that_are_not_utf8_are_replaced_with_a_warning(
    typed: Callable[..., TerminalReader], capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(b"a\xff\xc3b\r").read() == "a\ufffd\ufffdb"
    assert "not UTF-8" in capsys.readouterr().err


def test_in_a_terminal_bytes_of_every_kind_and_a_window_that_is_closed(
    model: str, data: Path, tmp_path: Path
) -> None:
    with Terminal("chat", "-m", model, "--max-tokens", "2", folder=data) as terminal:
        terminal.wait_for(">>>")
        terminal.send(b"caf\xe9 \xff\xfe\r")
        terminal.wait_for("not UTF-8")
        terminal.wait_for("seed ")
        terminal.send(f"/save {tmp_path}/typed.json\r".encode())
        terminal.wait_for("saved 1 exchange")
        terminal.send(b"\x1b[200~" + b"paste " * 20_000 + b"\x1b[201~\r")
        terminal.wait_for("the context holds")
        terminal.send(b"/load /dev/zero\r")
        terminal.wait_for("not a regular file")
        terminal.send(b"again\r")
        terminal.wait_for("seed ", 2)
        assert terminal.hang_up() in (143, 1)
    assert of_json(tmp_path / "typed.json")["exchanges"][0]["question"] == "caf\ufffd \ufffd\ufffd"
    assert [q for q, _ in Conversation.load(newest_kept()).exchanges][-1] == "again"


def test_in_a_terminal_on_a_full_disk(model: str, data: Path) -> None:
    """A limit on file sizes refuses every write, as a full disk does."""

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    with Terminal("chat", "-m", model, "--max-tokens", "2", folder=data, prepare=full) as terminal:
        terminal.wait_for(">>>")
        terminal.send(b"hello\r")
        terminal.wait_for("the history is not saved")
        terminal.wait_for("seed ")
        terminal.send(b"/save x\r")
        terminal.wait_for("cannot write")
        terminal.send(b"more\r")
        terminal.wait_for("seed ", 2)
        terminal.send(b"/exit\r")
        assert terminal.end() == 0


def random_keys(seed: int, count: int) -> bytes:
    """Returns random bytes without those that end or stop a program: Ctrl-C, Ctrl-D, Ctrl-Z, Ctrl-\\."""
    rng = random.Random(seed)
    allowed = [b for b in range(256) if b not in (0x03, 0x04, 0x1A, 0x1C)]
    parts = [
        b"\x1b[M !!",
        b"\x1b[<0;1;1M",
        b"\x1b[200~",
        b"\x1b[201~",
        b"\x18\x05",
        b"\x1b9",
        b"\x12",
        b"\r",
        b"\x1bOP",
    ]
    return b"".join(
        rng.choice(parts) if rng.random() < 0.1 else bytes([rng.choice(allowed)]) for _ in range(count)
    )


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.attack) for seed in range(2, 60))]
)
def test_random_bytes_typed_into_a_chat(model: str, data: Path, tmp_path: Path, seed: int) -> None:
    with Terminal("chat", "-m", model, "--max-tokens", "1", folder=data) as terminal:
        terminal.wait_for(">>>")
        terminal.send(random_keys(seed, 1500))
        terminal.send(b"\x1b[201~\x07\x03\x03")  # leaves a paste and a search, and drops the line
        terminal.send(f"\x03/save {tmp_path}/after.json\r".encode())
        terminal.wait_for("saved ")
        assert b"Traceback" not in terminal.said
        assert b"Press ENTER" not in terminal.said
        terminal.send(b"/exit\r")
        assert terminal.end() == 0
    assert (tmp_path / "after.json").is_file()


def test_parse_json_raises_nothing_but_value_errors_in_one_line() -> None:
    for text in ("", "{", "[" * 100_000, "1" * 5000, '{"a":' * 100_000, b"\xff", "NaN,", "\ud800"):
        with pytest.raises(ValueError) as caught:
            parse_json(text)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 100
    assert parse_json(b'{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}


def test_well_formed_joins_pairs_and_replaces_what_is_alone() -> None:
    assert well_formed("a\ud83d\ude00\udcffb\ud800") == "a😀\ufffdb\ufffd"
    plain = "höflich\0\x1b\ufffd"
    assert well_formed(plain) == plain
