"""The command `emlocal chat`: a conversation in a terminal or a pipe."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emlocal import console
from emlocal.cli.options import OutputOptions, open_backend, with_options
from emlocal.errors import UsageError
from emlocal.methods import HOW, Chosen, with_leave
from emlocal.settings import EM_PRESETS, Given, Plan, Resolved, describe_em, resolve_settings
from emlocal.settings.confidence import CALIBRATION, ConfidenceOptions
from emlocal.settings.constraint import from_files
from emlocal.settings.em import EM
from emlocal.settings.options import ENGINE, EngineOptions
from emlocal.settings.resolve import CONSTRAINT, GENERATION, SAMPLING, random_seed
from emlocal.settings.table import NOTHING, SET, options_of, shown
from emlocal.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emlocal.chat.conversation import Conversation
    from emlocal.chat.talk import Talk, Turn

_SEQUENCES = 4
_PARALLEL = 2  # answers side by side: /compare, and methods with several samples


@with_options
def chat(
    system: Annotated[str | None, typer.Option("--system", help="System message.", metavar="TEXT")] = None,
    load: Annotated[
        str | None, typer.Option("--load", help="Continue a saved conversation.", metavar="NAME")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the last chat that was interrupted.")
    ] = False,
    connect: Annotated[
        str | None,
        typer.Option("--connect", help="Chat with the OpenAI-compatible server at this URL.", metavar="URL"),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help="Read the server's key from this file. (default: OPENAI_API_KEY)",
            metavar="FILE",
        ),
    ] = None,
    output: OutputOptions = OutputOptions(),
    how: Annotated[Given, HOW.only("method", "allow_code")] = NOTHING,
    given: Annotated[Given, CALIBRATION, EM, SAMPLING, CONSTRAINT, ENGINE] = NOTHING,
) -> None:
    """Chat with a model. Type /help inside to list the commands."""
    from emlocal.chat.conversation import Conversation, chat_file, newest_kept
    from emlocal.settings.resolve import read_config

    if output.trace is not None:
        raise UsageError("--trace works with emlocal generate only", "leave it out")
    if resume and load:
        raise UsageError("--resume and --load contradict each other", "leave one of them out")
    if api_key_file is not None and connect is None:
        raise UsageError("--api-key-file needs a server", "add --connect URL, or leave it out")
    given, config = from_files(given), read_config()
    allow_code = how.get("allow_code", False)
    settings = ChatSettings(given, config, with_leave(how.get("method"), allow_code), allow_code)
    saved = newest_kept() if resume else chat_file(load) if load else None
    conversation = Conversation.load(saved) if saved else Conversation()
    if system is not None:
        conversation.system = system
    if resume and not output.quiet:
        console.note(f"continuing {counted(len(conversation.exchanges), 'exchange')} of {saved}")
    file = saved if load else None
    if connect is not None:
        _talk(_session_at(connect, api_key_file, given, settings, conversation), settings, output, file)
        return
    from emlocal.chat.session import ChatSession
    from emlocal.cli.options import calibration_in, warn_of_mismatch
    from emlocal.generation import Scheduler
    from emlocal.generation.speculation import speculation_of
    from emlocal.methods.confidence import subject_of
    from emlocal.methods.hints import without_effect

    layers = ("flag", given), ("config", config)
    options = options_of(EngineOptions, *layers)
    calibration = calibration_in(options_of(ConfidenceOptions, *layers).calibration)
    with open_backend(options, sequences=_SEQUENCES, quiet=output.quiet) as backend:
        settings.model = backend.info.sampling
        runner = Scheduler(backend, _PARALLEL, speculation_of(options.speculate, backend, console.warn))
        session = ChatSession(backend, runner, conversation, calibration, console.warn)
        turn = settings.turn()
        warn_of_mismatch(calibration, subject_of(backend.info.name, turn.method, turn.plan))
        for text in without_effect(turn.plan, backend.info, hides=output.hide_thinking):
            session.warn(text)
        _talk(session, settings, output, file)


def _session_at(
    url: str, key_file: Path | None, given: Given, settings: "ChatSettings", conversation: "Conversation"
) -> "Talk":
    """Returns a chat with the model that a server has. Raises EmlocalError."""
    from emlocal.chat.connected import ConnectedSession
    from emlocal.cli.connect import connected, remote_turn

    server = connected(url, key_file, given)
    remote_turn(server, settings.turn())  # what it cannot do is said before the first question
    return ConnectedSession(
        server.client,
        server.model,
        partial(remote_turn, server),
        server.context,
        conversation,
        console.warn,
    )


def _talk(session: "Talk", settings: "ChatSettings", output: OutputOptions, file: Path | None) -> None:
    """Runs the chat. Exits with 1 if something failed and no person was there to see it."""
    from emlocal.chat.input import PipeReader, TerminalReader
    from emlocal.chat.repl import Repl
    from emlocal.files import data_dir

    def status() -> str:
        return f"{session.name} · EM {settings.em_text()} · {repl.context_text()}"

    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    commands = ["help", "exit", "clear", "system", "set", "show", "stats", "entropy", "em", "method"]
    commands += ["vote", "compare", "regen", "undo", "edit", "save", "load"]
    reader = TerminalReader(data_dir() / "chat_history", commands, status) if terminal else PipeReader()
    repl = Repl(
        session,
        settings,
        reader,
        show_entropy=output.show_entropy,
        quiet=output.quiet,
        thoughts=not (output.quiet or output.hide_thinking),
        file=file,
    )
    with _ended_like_sigterm():
        repl.run()
    if repl.failures and not terminal:
        raise typer.Exit(1)


@contextmanager
def _ended_like_sigterm() -> Iterator[None]:
    """Ends the chat on SIGHUP (terminal closed) or SIGQUIT (Ctrl-\\) as on SIGTERM, within this block.

    The current answer is finished and the conversation is kept. Otherwise these signals would end the process
    at once.
    """
    numbers = [n for name in ("SIGHUP", "SIGQUIT") if (n := vars(signal).get(name)) is not None]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is signal.SIG_DFL}
    for number in before:
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ChatSettings:
    """The settings of a chat: its flags, as changed by /set, /em and /method."""

    def __init__(self, given: Given, config: Given, method: Chosen, allow_code: bool = False) -> None:
        """`allow_code`: whether methods may run code.

        Raises UsageError if the flags contradict each other.
        """
        self._allow_code = allow_code
        self.model: Mapping[str, float] = {}
        """Sampling settings of the loaded model."""
        self._before_off: Given | None = None
        """EM settings of the flags before `/em off`, for `/em on`; empty if the config file set EM."""
        self._config = config
        self._base = Plan(seed=random_seed())
        self._given, self._method = given, method
        self._resolved = resolve_settings(("flag", given), ("config", config), base=self._base)
        self._planned(self._resolved, method)

    def turn(self, method: str | None = None) -> "Turn":
        from emlocal.chat.talk import Turn
        from emlocal.cli.connect import own

        chosen = self._method if method is None else with_leave(method, self._allow_code)
        return Turn(self._planned(self._now(), chosen), chosen, own({**self._config, **self._given}))

    def method(self, choice: str) -> None:
        method = with_leave(None if choice == "off" else choice, self._allow_code)
        self._planned(self._resolved, method)
        self._method = method

    def method_text(self) -> str:
        return self._method.written or "off"

    @staticmethod
    def _planned(resolved: Resolved, method: Chosen) -> Plan:
        return method.plan(resolved.plan, resolved.chosen)

    def set(self, name: str, value: str) -> None:
        new = from_files(GENERATION.read_text(name, value, SET))
        others = self._given
        if new.keys() & CONSTRAINT.settings.keys():  # an answer has one form
            others = {known: v for known, v in others.items() if known not in CONSTRAINT.settings}
        self._take({**others, **new})

    def em(self, choice: str) -> None:
        own = {name: value for name, value in self._given.items() if name in EM.settings}
        others = {name: value for name, value in self._given.items() if name not in EM.settings}
        is_on = self._resolved.plan.params.em is not None
        if choice == "off":
            self._before_off = own if is_on else self._before_off
            self._take({**others, "em_inf": False})
        elif choice == "on":
            if not is_on:
                before = {"em_inf": True} if self._before_off is None else self._before_off
                self._take({**others, **before})
        elif choice in EM_PRESETS:
            self._take({**others, "em_preset": choice})
        else:
            raise UsageError(
                f"/em {choice}: it takes on, off, or a preset ({', '.join(EM_PRESETS)})", "/em on"
            )

    def em_text(self) -> str:
        return describe_em(self._planned(self._resolved, self._method).params.em)

    def rows(self) -> list[tuple[str, str, str]]:
        now = self._now()
        values = {**vars(now.params), **vars(now.plan)}
        rows = []
        for name, known in SAMPLING.settings.items():
            source = now.sources[name]
            if isinstance(values[name], int | float):
                text = f"{values[name]:g}" if isinstance(values[name], float) else str(values[name])
                rows.append((known.flag.removeprefix("--"), text, source))
        rows += [("stop", repr(text), now.sources["stop"]) for text in now.plan.stop]
        rows += [
            ("logit-bias", f"{token}={b:g}", now.sources["logit_bias"]) for token, b in now.params.logit_bias
        ]
        constraint = now.plan.constraint
        if constraint is not None:
            flag = CONSTRAINT.settings[constraint.kind].flag.removeprefix("--")
            rows.append((flag, shown(constraint.text), now.sources[constraint.kind]))
        return [*rows, ("em", self.em_text(), "")]

    def _take(self, given: Given) -> None:
        """Uses these flags from now on.

        If they contradict each other, raises UsageError and keeps the old ones.
        """
        resolved = resolve_settings(("flag", given), ("config", self._config), base=self._base, words=SET)
        self._planned(resolved, self._method)
        self._given, self._resolved = given, resolved

    def _now(self) -> Resolved:
        return self._resolved.with_model(self.model)
