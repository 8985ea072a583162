"""`emlocal chat --connect`: the chat is the same, and the model is on a server."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emlocal.backends.fake import saying
from emlocal.cancel import never
from emlocal.chat.connected import ConnectedSession
from emlocal.chat.talk import Piece, Turn
from emlocal.cli.chat import ChatSettings
from emlocal.cli.connect import connected, remote_turn
from emlocal.errors import CancelledError, UsageError
from emlocal.methods import Chosen
from emlocal.remote.client import ServerError
from tests.remote.test_batch import Plain, plain, serving
from tests.serve.servers import KEY, endless, running


def chat(
    url: str, text: str, *more: str, folder: Path, key: str | None = None
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "EMLOCAL_DATA_DIR": str(folder), **({} if key is None else {"OPENAI_API_KEY": key})}
    return subprocess.run(
        [sys.executable, "-m", "emlocal", "chat", "--connect", url, *more],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
    )


def session(url: str, **given: Any) -> tuple[ConnectedSession, Callable[[], Turn]]:
    server = connected(url, None, {})
    settings = ChatSettings({"seed": 3, "max_tokens": 30, **given}, {}, Chosen())
    talk = ConnectedSession(
        server.client, server.model, lambda turn: remote_turn(server, turn), server.context
    )
    return talk, settings.turn


def texts(events: Any) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def test_a_chat_with_emlocals_server(tmp_path: Path) -> None:
    with running(saying("Guten Tag", "und zwei")) as server:
        done = chat(server.url, "hi\n/stats\nagain\n/entropy\n/show\n/save a\n", folder=tmp_path)
        assert done.stdout == "Guten Tag\nund zwei\n"
        assert done.returncode == 0, done.stderr
        server.wait(server.idle)
    assert "answer 9 tokens" in done.stderr
    assert "log-probability" in done.stderr
    assert "tokens with the highest entropy:" in done.stderr
    assert "but for the seed, defaults are not sent" in done.stderr
    assert " of 4,096 tokens; fake" in done.stderr
    saved = json.loads((tmp_path / "chats" / "a.json").read_text())
    assert [pair["answer"] for pair in saved["exchanges"]] == ["Guten Tag", "und zwei"]


def test_the_text_is_the_servers_and_draws_differ_by_turn_and_attempt() -> None:
    with running() as server:
        talk, turn = session(server.url)
        first = texts(talk.ask("a", turn(), never))
        body = {"messages": [{"role": "user", "content": "a"}], "seed": 3, "max_tokens": 30}
        assert server.chat(**{**body, "custom_id": "turn 0"})["choices"][0]["message"]["content"] == first
        assert talk.conversation.exchanges == [("a", first)]
        assert len(talk.shown()) == 30
        assert all(shown.entropy_before > 0 for shown in talk.shown())
        assert texts(talk.ask_again(turn(), never)) != first
        assert len(talk.conversation.exchanges) == 1
        talk.forget()
        assert texts(talk.ask("a", turn(), never)) == first


def test_em_and_votes_go_to_the_server() -> None:
    with running(saying("it is 7")) as server:
        talk, turn = session(server.url, em_inf=True, em_threshold=0.0)
        list(talk.ask("a", turn(), never))
        assert "EM touched" in talk.summary()
        settings = ChatSettings({"seed": 3}, {}, Chosen("vote:4"))
        assert texts(talk.ask_again(settings.turn(), never)) == "it is 7"
        assert " agree" in talk.summary()
        assert "confidence" in talk.summary()


def test_a_vote_that_is_cut_off_tells_of_its_own_answer_and_of_what_it_lacks() -> None:
    with running(endless) as server:
        talk, _ = session(server.url)
        settings = ChatSettings({"seed": 3, "max_tokens": 20}, {}, Chosen("vote:3"))
        list(talk.ask("a", settings.turn(), never))
        said = talk.summary()
    assert "answer 60 tokens" in said
    assert "cut off after 20 tokens" in said
    assert "none of 3 has an answer to vote on" in said
    assert "confidence 0.00 (the method's own, not calibrated)" in said


def test_a_token_that_em_changed_says_so(tmp_path: Path) -> None:
    with running(endless) as server:
        flags = ("--em-inf", "--em-threshold", "0", "--max-tokens", "30", "--seed", "3", "--temp", "1")
        done = chat(server.url, "hi\n/entropy\n", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ", without EM another token\n" in done.stderr


def test_a_stopped_answer_keeps_its_text_and_the_server_stops() -> None:
    with running(endless, seconds=0.01) as server:
        talk, turn = session(server.url, max_tokens=2000)
        seen: list[str] = []

        def enough() -> bool:
            return len(seen) >= 3

        for event in talk.ask("a", turn(), enough):
            assert isinstance(event, Piece)
            seen.append(event.text)
        server.wait(server.idle)
        assert talk.conversation.exchanges == [("a", "".join(seen))]
        assert "stopped by Ctrl-C" in talk.summary()
        with pytest.raises(CancelledError):
            list(talk.ask("b", turn(), lambda: True))
        server.wait(server.idle)
        assert len(talk.conversation.exchanges) == 1


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(tmp_path: Path) -> None:
    with running(endless, seconds=0.01, given={"max_tokens": 3000}) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "emlocal", "chat", "--connect", server.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "EMLOCAL_DATA_DIR": str(tmp_path)},
        )
        assert process.stdin is not None
        process.stdin.write("hi\n/stats\n")
        process.stdin.close()
        server.wait(lambda: server.server.engine.running > 0, 30)
        time.sleep(0.3)
        process.send_signal(2)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(20) == 0, said
        assert said.count("stopped by Ctrl-C") == 2  # after the answer, and from /stats
        server.wait(server.idle)


def test_a_plain_server_that_does_not_stream(tmp_path: Path) -> None:
    with plain() as (url, bodies):
        done = chat(url, "hi\n/entropy\n/compare\n", "--temp", "0.5", folder=tmp_path)
        assert done.stdout == "said hi\n"
        assert done.returncode == 1  # two commands failed
        assert "its server does not send them" in done.stderr
        assert "/compare needs the model here" in done.stderr
        assert bodies[0]["temperature"] == 0.5
        assert bodies[0]["stream"] is True
        assert "logprobs" not in bodies[0]
        for flags in (["--em-inf"], ["--method", "vote:3"]):
            done = chat(url, "hi\n", *flags, folder=tmp_path)
            assert done.returncode in (1, 2)
            assert done.stderr.startswith("error: the server")
            assert "does not know" in done.stderr
        assert len(bodies) == 1


class Breaking(Plain):
    """Ends in the middle of its stream, or sends an error there."""

    end = b""

    def do_POST(self) -> None:  # noqa: N802
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.end_headers()
        self.wfile.write(
            b': wait\n\ndata: {"choices":[{"index":0,"delta":{"content":"Hal"}}]}\n\n' + self.end
        )
        self.close_connection = True


class Failing(Breaking):
    end = b'data: {"error":{"message":"out of memory"}}\n\n'


class Mad(Breaking):
    end = b"data: [1, 2\n\n"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Breaking, "ended in the middle of its answer"),
        (Failing, "the server says: out of memory"),
        (Mad, "is not a JSON object"),
    ],
)
def test_a_stream_that_breaks_is_an_error_and_changes_nothing(kind: type[Breaking], said: str) -> None:
    with serving(kind) as (url, _):
        talk, turn = session(url)
        with pytest.raises(ServerError, match=said):
            list(talk.ask("a", turn(), never))
        assert talk.conversation.exchanges == []
        assert talk.last_turn is None


def test_what_was_shown_of_a_broken_answer_ends_its_line(tmp_path: Path) -> None:
    with serving(Breaking) as (url, _):
        done = chat(url, "hi\n", folder=tmp_path)
    assert done.stdout == "Hal\n"
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_keys_and_absent_servers(tmp_path: Path) -> None:
    with running(saying("x"), keys=[KEY]) as server:
        done = chat(server.url, "hi\n", folder=tmp_path, key="wrong-key-of-some-length")
        assert done.returncode == 1
        assert done.stderr.startswith("error: the server says 401")
        assert chat(server.url, "hi\n", folder=tmp_path, key=KEY.decode()).stdout == "x\n"
    done = chat("localhost:9", "hi\n", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the server at localhost:9 does not answer")
    done = chat("localhost:9", "hi\n", "--threads", "2", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""


def test_a_server_that_is_slow_to_answer_can_be_left() -> None:
    """Ctrl-C does not wait for a server that says nothing."""

    class Silent(Plain):
        def do_POST(self) -> None:  # noqa: N802
            gone.wait(20)

    gone = threading.Event()
    with serving(Silent) as (url, _):
        talk, turn = session(url)
        started = time.monotonic()
        with pytest.raises(CancelledError):
            list(talk.ask("a", turn(), lambda: time.monotonic() - started > 0.2))
        assert time.monotonic() - started < 5
        gone.set()


def test_settings_for_an_engine_are_refused() -> None:
    with running() as server, pytest.raises(UsageError, match="where the server starts"):
        connected(server.url, None, {"threads": 2})
