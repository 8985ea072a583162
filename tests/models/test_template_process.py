"""The process that renders strangers' templates: it stays, it ends with its parent, and signals work."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import emlocal
from emlocal.cancel import interruptible
from emlocal.errors import CancelledError, EmlocalError, ModelError
from emlocal.models import templates
from emlocal.models.template_worker import MAX_MEMORY, Outcome, rendered, watched
from emlocal.models.templates import TemplateProcess, digest, is_known, render
from tests.conftest import DATA
from tests.tiny_gguf import write_tiny_gguf

HI = [{"role": "user", "content": "hi"}]
ECHO = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ x }}"
ENDLESS = "{{ [[0]*1000000]*1000000 == [[0]*1000000]*1000000 }}{{ messages }}"
ENDLESS_TO_COMPILE = "{{ [[0]*1000000]*1000000 == [[0]*1000000]*1000000 }}"
QWEN = (DATA / "qwen2.5-chat-template.jinja").read_text("utf-8")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is 2 < 3? \\n {{ x }} \n\x00\x1b\u2028 é 你 \U0001f600"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "and?"},
]
posix = sys.platform != "win32"


@pytest.fixture
def process() -> Iterator[TemplateProcess]:
    one = TemplateProcess()
    yield one
    one.close()


def asked(template: str, content: str = "hi") -> dict[str, object]:
    return {"template": template, "messages": [{"role": "user", "content": content}], "values": {"x": 1}}


def exists(pid: int) -> bool:
    """Whether a process exists and still runs; a zombie, which waits for its parent, does not count."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until_gone(pid: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while exists(pid):
        assert time.monotonic() < until, f"{pid} is still there"
        time.sleep(0.02)


class TestKnownTemplates:
    def test_they_need_no_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(templates, "_process", None)
        assert is_known(QWEN)
        templates.start_process(QWEN)
        templates.prepare(QWEN)
        assert render(QWEN, HI).endswith("<|im_start|>assistant\n")

    def test_one_more_character_makes_a_stranger(self) -> None:
        assert is_known(QWEN.removesuffix("\n")) == is_known(QWEN.removesuffix("\n") + "\n") == True  # noqa: E712
        assert not is_known(QWEN + " ")
        assert not is_known(QWEN.removesuffix("\n") + "\n\n")
        assert not is_known("")

    def test_digests_are_those_of_the_list(self) -> None:
        assert digest(QWEN) == "d1bd64247b90dd7ca8300718b755d323"
        assert digest("\ud800") != digest("?")

    @pytest.mark.parametrize("messages", [HI, TALK])
    def test_both_ways_give_the_same_text(self, messages: list[dict[str, str]]) -> None:
        assert render(QWEN, messages) == render(QWEN + "{# a stranger's #}", messages)

    def test_the_worst_messages_are_no_burden(self) -> None:
        for text in ("<|im_start|>", "</think>", "<tool_response>", "\n", "{{ x }}", "\U0001f600"):
            messages = [{"role": role, "content": text * 50_000} for role in ("user", "assistant", "tool")]
            assert text in render(QWEN, messages)


class TestTheProcess:
    def test_it_stays(self, process: TemplateProcess) -> None:
        assert process.pid is None
        assert process.ask(asked(ECHO, "a")) == ("text", "user: a\n1")
        first = process.pid
        assert process.ask(asked(ECHO, "b")) == ("text", "user: b\n1")
        assert process.pid == first

    def test_text_comes_back_as_it_was(self) -> None:
        expected = "".join(f"{m['role']}: {m['content']}\n" for m in TALK)
        assert render(ECHO, TALK) == expected
        long = "né \U0001f600\n" * 100_000
        assert render(ECHO, [{"role": "user", "content": long}]) == f"user: {long}\n"

    def test_half_a_character_is_the_templates_fault(self) -> None:
        with pytest.raises(ModelError, match="surrogates not allowed"):
            render("{{ '\\ud800' }}{{ messages }}", HI)

    def test_it_is_compiled_ahead(self, process: TemplateProcess) -> None:
        process.prepare(ECHO)
        first = process.pid
        assert process.ask(asked(ECHO)) == ("text", "user: hi\n1")
        assert process.pid == first

    def test_what_is_prepared_may_be_anything(self, process: TemplateProcess) -> None:
        for template in ("{% if %}", "\ud800", "a" * 1_000_000, ""):
            process.prepare(template)
        assert process.ask(asked(ECHO)) == ("text", "user: hi\n1")

    def test_endless_compilation_is_stopped_once(
        self, process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(templates, "MAX_SECONDS", 0.3)
        process.prepare(ENDLESS_TO_COMPILE)
        first = process.pid
        assert process.ask(asked(ENDLESS_TO_COMPILE))[0] == "stopped"
        assert process.pid is None
        process.prepare(ENDLESS_TO_COMPILE)
        assert process.ask(asked(ECHO)) == ("text", "user: hi\n1")  # the next template must not suffer
        assert process.pid not in (None, first)

    def test_one_that_was_killed_is_replaced(self, process: TemplateProcess) -> None:
        process.ask(asked(ECHO))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL if posix else signal.SIGTERM)
        wait_until_gone(process.pid, 10)
        assert process.ask(asked(ECHO)) == ("text", "user: hi\n1")

    def test_one_that_is_stopped_is_replaced(
        self, process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process.ask(asked(ECHO))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        monkeypatch.setattr(templates, "MAX_SECONDS", 0.3)
        assert process.ask(asked(ECHO))[0] == "stopped"
        assert process.ask(asked(ECHO)) == ("text", "user: hi\n1")

    def test_it_holds_no_file_of_ours(self, process: TemplateProcess, tmp_path: Path) -> None:
        with (tmp_path / "open").open("w"):
            process.ask(asked(ECHO))
            assert process.pid is not None
            held = sorted(os.listdir(f"/proc/{process.pid}/fd"))  # noqa: PTH208
        assert held == ["0", "1", "2"]

    def test_memory_is_bounded_within_one_call(self, process: TemplateProcess) -> None:
        kind, why = process.ask(asked("{% set a = 'a' * 1000000 %}{{ (a" + "~a" * 3000 + ") | length }}"))
        assert (kind, why) == ("stopped", "it needed more than 200 MB of memory")
        assert process.pid is None  # its leftovers would count against the next one
        assert process.ask(asked(ECHO)) == ("text", "user: hi\n1")

    def test_a_long_conversation_may_take_more(self, process: TemplateProcess) -> None:
        long = "\U0001f600" * (MAX_MEMORY // 40)  # 20 MB as text, and as much again in each copy
        kind, text = process.ask(asked("{% for m in messages %}{{ m.content | trim }}{% endfor %}", long))
        assert (kind, text == long) == ("text", True)

    def test_many_threads(self) -> None:
        def turn(i: int) -> Outcome:
            return render(f"{ECHO}{{# {i % 5} #}}", [{"role": "user", "content": str(i)}], x=i)

        with ThreadPoolExecutor(16) as pool:
            said = list(pool.map(turn, range(200)))
        assert said == [f"user: {i}\n{i}" for i in range(200)]

    def test_where_memory_is_only_looked_at(self) -> None:
        """As on macOS, where the system enforces no memory limit."""
        loop = (
            "{% set ns = namespace(x=messages) %}{% for i in range(99) %}{% set ns.x = [ns.x] %}{% endfor %}"
        )
        with watched(1 << 50):
            assert rendered(loop, HI, {}) == ("text", "")
        with watched(1):
            assert rendered(loop, HI, {})[0] == "stopped"
        assert rendered(loop, HI, {}) == ("text", "")


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_one_ends_a_template_at_once(self, process: TemplateProcess, number: int) -> None:
        process.ask(asked(ECHO))
        outer = signal.signal(signal.SIGTERM, lambda number, frame: None)
        try:
            with interruptible() as cancelled, signalled(number), pytest.raises(CancelledError):
                process.ask(asked(ENDLESS))
            assert cancelled.requested
        finally:
            signal.signal(signal.SIGTERM, outer)
        assert process.pid is None
        assert process.ask(asked(ECHO)) == ("text", "user: hi\n1")

    def test_ctrl_c_elsewhere(self, process: TemplateProcess) -> None:
        process.ask(asked(ECHO))
        with signalled(signal.SIGINT), pytest.raises(KeyboardInterrupt):
            process.ask(asked(ENDLESS))
        assert process.pid is None
        assert process.ask(asked(ECHO)) == ("text", "user: hi\n1")

    def test_ctrl_c_of_a_terminal_is_not_for_it(self) -> None:
        """The signal goes to the whole process group."""
        with running(
            "import signal; signal.signal(signal.SIGINT, lambda *_: None)\n"
            "said()\nsys.stdin.readline()\nsaid()\n"
        ) as (program, pid):
            os.killpg(program.pid, signal.SIGINT)
            out, err = program.communicate("\n", timeout=60)
        assert json.loads(out) == ["user: hi\n", pid]
        assert err == ""


class TestTheEnd:
    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None])
    def test_it_ends_with_its_parent(self, how: int | None) -> None:
        with running("said()\nsys.stdin.readline()\n") as (program, pid):
            assert exists(pid)
            if how is None:
                program.communicate("\n", timeout=60)
            else:
                program.send_signal(how)
                program.wait(60)
        wait_until_gone(pid, 30)

    def test_it_ends_with_its_parent_in_the_middle_of_a_template(self) -> None:
        with running(f"said()\nrender({ENDLESS!r}, HI)\n") as (program, pid):
            time.sleep(0.3)
            assert exists(pid)
            program.kill()
            program.wait(60)
        wait_until_gone(pid, 30)  # its alarm: three seconds

    def test_after_a_fork_both_have_one(self) -> None:
        code = (
            "said()\nchild = os.fork()\nsaid()\nif child:\n    os.waitpid(child, 0)\n    said()\n"
            "else:\n    os._exit(0)\n"
        )
        done = once(code)
        pids = [json.loads(line)[1] for line in done.stdout.splitlines()]
        assert [pids.count(pid) for pid in pids].count(1) == 1  # the child's own
        assert pids.count(pids[0]) == 3


class TestHardPlaces:
    def test_isolated_and_elsewhere(self, tmp_path: Path) -> None:
        """The process imports nothing from folders that a stranger can write to."""
        for name in ("jinja2.py", "markupsafe.py", "json.py", "sitecustomize.py", "signal.py"):
            (tmp_path / name).write_text("raise SystemExit(3)\n")
        package = str(Path(templates.__file__).parents[2])
        done = once("said()", "-I", cwd=tmp_path, path=package)
        assert json.loads(done.stdout)[0] == "user: hi\n"

    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
    def test_closed_descriptors(self, closed: str, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        out = tmp_path / "out"
        script.write_text(PROGRAM + f"open({str(out)!r}, 'w').write(render({ECHO!r}, HI))\n")
        subprocess.run(
            ["sh", "-c", f'"$0" "$1" {closed}', sys.executable, str(script)],
            check=True,
            timeout=60,
            env=environment(),
        )
        assert out.read_text() == "user: hi\n"

    def test_no_room_for_files(self, tmp_path: Path) -> None:
        """The process needs no disk space, no folder and no network."""
        gone = tmp_path / "gone"
        gone.mkdir()
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); os.rmdir(os.getcwd())\n"
            "print(repr(render(ECHO, HI)))"
        )
        done = once(code, cwd=gone)
        assert done.stdout == "'user: hi\\n'\n"

    @pytest.mark.parametrize(
        ("limit", "why"),
        [
            ("resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))", "Too many open files"),
            # root may start any number
            (
                "os.getuid() or os.setuid(65534); resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))",
                "Resource temporarily unavailable",
            ),
            ("sys.executable = '/nowhere/python'", "No such file or directory"),
            ("sys.executable = ''", "sys.executable is not set"),
            ("sys.executable = '/bin/false'", "it ended with code 1"),
        ],
    )
    def test_it_cannot_be_started(self, limit: str, why: str) -> None:
        code = (
            f"said(); templates._process.close(); import resource; {limit}\n"
            "templates.start_process(ECHO)\n"
            "try:\n    render(ECHO, HI)\n"
            "except EmlocalError as error:\n    print(error.message); print(error.hint)\n"
        )
        done = once(code)
        _, message, hint = done.stdout.splitlines()
        assert message == f"the process for the model's chat template cannot be started: {why}"
        assert "--raw" in hint

    def test_no_more_threads(self, process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
        process.ask(asked(ECHO))

        def none_left(self: object) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr("threading.Thread.start", none_left)
            with pytest.raises(EmlocalError, match="can't start new thread"):
                process.ask(asked(ECHO))
        assert process.ask(asked(ECHO)) == ("text", "user: hi\n1")


class signalled:  # noqa: N801 (a context)
    """Sends a signal from another process within this block, once a template runs."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        command = f"sleep 0.4; kill -{self._number:d} {os.getpid()}"
        self._sender = subprocess.Popen(["sh", "-c", command])

    def __exit__(self, *_: object) -> None:
        self._sender.wait()


PROGRAM = f"""
import json, os, sys
from emlocal.errors import EmlocalError
from emlocal.models import templates
from emlocal.models.templates import render
HI, ECHO = {HI!r}, {ECHO!r}
def said():
    print(json.dumps([render(ECHO, HI), templates._process.pid]), flush=True)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(templates.__file__).parents[2])}


def once(code: str, *flags: str, cwd: Path | None = None, path: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a program that renders, from beginning to end."""
    first = f"import sys; sys.path.insert(0, {path!r})\n" if path else ""
    return subprocess.run(
        [sys.executable, *flags, "-c", first + PROGRAM + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=cwd,
        env=environment(),
    )


class running:  # noqa: N801 (a context)
    """Runs a program that renders in its own process group; gives the pid of its template process."""

    def __init__(self, code: str) -> None:
        self._code = code

    def __enter__(self) -> tuple["subprocess.Popen[str]", int]:
        self._program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM + self._code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment(),
        )
        assert self._program.stdout is not None
        return self._program, json.loads(self._program.stdout.readline())[1]

    def __exit__(self, *_: object) -> None:
        self._program.kill()
        self._program.communicate()


@pytest.mark.real
def test_loading_a_model_from_python_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the command line, the first prompt need not wait for it."""
    one = TemplateProcess()
    monkeypatch.setattr(templates, "_process", one)
    path = write_tiny_gguf(tmp_path / "model.gguf", chat_template=ECHO)
    with emlocal.load(path, threads=1):
        assert one.pid is not None
    one.close()
