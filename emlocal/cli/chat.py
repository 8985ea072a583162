"""`emlocal chat`: a conversation in a terminal or a pipe."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from emlocal import console
from emlocal.cli.options import OutputOptions, open_backend, with_options
from emlocal.em.steps import EMInf
from emlocal.errors import UsageError
from emlocal.methods import HOW, Chosen, with_leave
from emlocal.settings import EM_PRESETS, Given, Plan, Resolved, describe_em, resolve_settings
from emlocal.settings.confidence import CALIBRATION, ConfidenceOptions
from emlocal.settings.em import EM, em_numbers
from emlocal.settings.options import ENGINE, EngineOptions
from emlocal.settings.resolve import GENERATION, SAMPLING, random_seed
from emlocal.settings.table import NOTHING, SET, options_of
from emlocal.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emlocal.chat.session import Turn

_SEQUENCES = 4
_PARALLEL = 2  # answers side by side: /compare, and methods that draw several


@with_options
def chat(
    system: Annotated[str | None, typer.Option("--system", help="System message.", metavar="TEXT")] = None,
    load: Annotated[
        str | None, typer.Option("--load", help="Go on with a saved conversation.", metavar="NAME")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last chat that ended unforeseen.")
    ] = False,
    output: OutputOptions = OutputOptions(),
    how: Annotated[Given, HOW.only("method", "allow_code")] = NOTHING,
    given: Annotated[Given, CALIBRATION, EM, SAMPLING, ENGINE] = NOTHING,
) -> None:
    """Talk with a model. /help inside lists the commands."""
    from emlocal.chat.input import PipeReader, TerminalReader
    from emlocal.chat.repl import Repl
    from emlocal.chat.session import ChatSession, Conversation, chat_file, newest_kept
    from emlocal.cli.options import calibration_in, warn_of_mismatch
    from emlocal.files import data_dir
    from emlocal.generation import Scheduler
    from emlocal.methods.confidence import subject_of
    from emlocal.settings.resolve import read_config

    if output.trace is not None:
        raise UsageError("--trace belongs to emlocal generate")
    if resume and load:
        raise UsageError("--resume and --load contradict each other", "leave one of them out")
    config = read_config()
    allow_code = how.get("allow_code", False)
    settings = ChatSettings(given, config, with_leave(how.get("method"), allow_code), allow_code)
    saved = newest_kept() if resume else chat_file(load) if load else None
    conversation = Conversation.load(saved) if saved else Conversation()
    if system is not None:
        conversation.system = system
    layers = ("flag", given), ("config", config)
    options = options_of(EngineOptions, *layers)
    calibration = calibration_in(options_of(ConfidenceOptions, *layers).calibration)
    with open_backend(options, sequences=_SEQUENCES, quiet=output.quiet) as backend:
        settings.model = backend.info.sampling
        session = ChatSession(backend, Scheduler(backend, _PARALLEL), conversation, calibration)
        turn = settings.turn()
        warn_of_mismatch(calibration, subject_of(backend.info.name, turn.method, turn.plan))

        def status() -> str:
            used = f"{session.context_used:,}/{backend.context:,} tokens"
            return f"{backend.info.name} · EM {settings.em_text()} · {used}"

        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        commands = ["help", "exit", "clear", "system", "set", "show", "stats", "entropy", "em", "method"]
        commands += ["vote", "compare", "regen", "undo", "edit", "save", "load"]
        reader = TerminalReader(data_dir() / "chat_history", commands, status) if terminal else PipeReader()
        repl = Repl(session, settings, reader, show_entropy=output.show_entropy, quiet=output.quiet)
        if resume and not output.quiet:
            console.note(f"going on with {counted(len(conversation.exchanges), 'exchange')} of {saved}")
        with _ended_like_sigterm():
            repl.run()
    if repl.failures and not terminal:
        raise typer.Exit(1)


@contextmanager
def _ended_like_sigterm() -> Iterator[None]:
    """Within this block a terminal that is closed and Ctrl-\\ end the chat as SIGTERM does: after the answer
    in hand, with the conversation kept. Without it they would end the process on the spot."""
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
    """The flags, as /set and /em change them."""

    def __init__(self, given: Given, config: Given, method: Chosen, allow_code: bool = False) -> None:
        """`allow_code`: methods may run code. Raises UsageError where the flags contradict each other."""
        self._allow_code = allow_code
        self.model: Mapping[str, float] = {}
        """The loaded model's own settings."""
        self._config = config
        self._base = Plan(seed=random_seed())
        self._given, self._method = given, method
        self._resolved = resolve_settings(("flag", given), ("config", config), base=self._base)
        self._planned(self._resolved, method)

    def turn(self, method: str | None = None) -> "Turn":
        from emlocal.chat.session import Turn

        chosen = self._method if method is None else with_leave(method, self._allow_code)
        return Turn(self._planned(self._now(), chosen), chosen)

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
        self._take({**self._given, **GENERATION.read_text(name, value, SET)})

    def em(self, choice: str) -> None:
        others = {name: value for name, value in self._given.items() if name not in EM.settings}
        if choice == "off":
            self._take({**others, "em_inf": False})
        elif choice == "on":  # what belongs to other steps goes with them
            kept = self._given.keys() & {"em_preset", *em_numbers(EMInf)}
            self._take({**others, **{name: self._given[name] for name in kept}, "em_inf": True})
        elif choice in EM_PRESETS:
            self._take({**others, "em_preset": choice})
        else:
            raise UsageError(f"/em {choice}: it takes on, off, or a preset ({', '.join(EM_PRESETS)})")

    def em_text(self) -> str:
        return describe_em(self._planned(self._resolved, self._method).params.em)

    def rows(self) -> list[tuple[str, str, str]]:
        now = self._now()
        values = {**vars(now.params), **vars(now.plan)}
        rows = []
        for name, known in SAMPLING.settings.items():
            source = now.sources[name]
            if isinstance(values[name], int | float):
                shown = f"{values[name]:g}" if isinstance(values[name], float) else str(values[name])
                rows.append((known.flag.removeprefix("--"), shown, source))
        rows += [("stop", repr(text), now.sources["stop"]) for text in now.plan.stop]
        rows += [
            ("logit-bias", f"{token}={b:g}", now.sources["logit_bias"]) for token, b in now.params.logit_bias
        ]
        return [*rows, ("em", self.em_text(), "")]

    def _take(self, given: Given) -> None:
        """Use these from now on. Raises UsageError, and keeps the old ones, for a contradiction."""
        resolved = resolve_settings(("flag", given), ("config", self._config), base=self._base, words=SET)
        self._planned(resolved, self._method)
        self._given, self._resolved = given, resolved

    def _now(self) -> Resolved:
        return self._resolved.with_model(self.model)
