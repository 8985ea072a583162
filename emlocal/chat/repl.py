"""The chat loop: it reads lines, answers questions and runs commands, in a terminal or a pipe alike."""

import difflib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from emlocal import console, rendering
from emlocal.chat.conversation import Conversation, chat_file, new_file, newest_saved
from emlocal.chat.session import ChatSession
from emlocal.chat.talk import AnswerEvent, Piece, Shown, Talk, Turn
from emlocal.errors import EmlocalError, UsageError, explained
from emlocal.generation import CancelledError, Completed, Completion, Token, interruptible
from emlocal.text import change, counted

HELP = """\
/help              show this list
/exit              leave, as with Ctrl-D; Ctrl-C stops an answer
/clear             clear the conversation
/system [TEXT]     show or set the system message
/set NAME VALUE    change a setting by its flag's name: /set temp 0.7
/show              show the settings and their sources
/stats             show token counts and speed of answer and chat
/entropy [on|off]  show the last answer's entropy; on colours answers
/em [on|off|NAME]  switch EM as it was set, or choose a preset: default, paper, em-pt
/method [NAME|off] set the method, such as vote:8; off: sampling and EM flags
/vote [N]          answer the last question again by a vote of N answers (8)
/compare           answer again with EM off and on, from the same draws
/regen             answer the last question again with other draws
/undo              remove the last question and answer
/edit [TEXT]       change the last question and ask it again
/save [NAME]       save the conversation under a name or path, or where it was saved before
/load [NAME]       continue a saved conversation, or the one that was saved last
Text over several lines goes between two lines of \"\"\" (in a terminal Alt-Enter also makes a new line);
a message that begins with a slash is written with two."""


class Settings(Protocol):
    """The settings of a chat, as the command line stores them."""

    def turn(self, method: str | None = None) -> Turn:
        """Returns the settings of the next answer, or of one by another method. Raises UsageError."""

    def set(self, name: str, value: str) -> None:
        """Changes a setting, named like its flag. Raises UsageError."""

    def em(self, choice: str) -> None:
        """Sets EM to on, off or a preset. Raises UsageError."""

    def em_text(self) -> str:
        """Returns the EM settings in words."""

    def method(self, choice: str) -> None:
        """Sets the method, written as for `emlocal batch --method`, or off. Raises UsageError."""

    def method_text(self) -> str:
        """Returns the method as it was chosen, or off."""

    def rows(self) -> list[tuple[str, str, str]]:
        """Returns (name, value, source) of each setting."""


class Reader(Protocol):
    """A source of messages."""

    def read(self, default: str = "") -> str | None:
        """Returns the next message, or None at the end. A terminal offers `default` for editing."""

    interactive: bool


class Repl:
    """A chat in progress."""

    def __init__(
        self,
        session: Talk,
        settings: Settings,
        reader: Reader,
        *,
        show_entropy: bool,
        quiet: bool,
        thoughts: bool = True,
        file: Path | None = None,
    ) -> None:
        """`thoughts`: show them on a terminal; `file`: the conversation's own, if it has one."""
        self.session = session
        self.settings = settings
        self.reader = reader
        self.quiet = quiet
        self._thoughts = thoughts
        self.writer = rendering.AnswerWriter(show_entropy, thoughts=thoughts)
        self.failures = 0
        self._draft = ""  # text that /edit offers, or that could not be handled
        self._file = file
        self._in_file = _copy_of(session.conversation)  # copy of the conversation as it stands in a file
        self._done = False
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "exit": self._exit,
            "clear": self._clear,
            "system": self._system,
            "set": self._set,
            "show": self._show,
            "stats": self._stats,
            "entropy": self._entropy,
            "em": self._em,
            "method": self._method,
            "vote": self._vote,
            "compare": self._compare,
            "regen": self._regen,
            "undo": self._undo,
            "edit": self._edit,
            "save": self._save,
            "load": self._load,
        }

    def run(self) -> None:
        """Runs until /exit or the end of the input.

        A failure is reported and counted, and the chat continues.

        If anything else ends the chat, a copy of an unsaved conversation is written.
        """
        try:
            while not self._done and self._turn():
                pass
        except BaseException:
            self._keep()
            raise

    def _turn(self) -> bool:
        """Reads and handles one message; returns False at the end of the input."""
        draft, self._draft = self._draft, ""
        try:
            message = self.reader.read(draft)
        except EmlocalError as error:
            self._fail(error)
            return True
        if message is None:
            return False
        try:
            if message.strip():
                self.handle(message)
        except EmlocalError as error:
            self._fail(error)
        except (CancelledError, BrokenPipeError):  # told to stop, or nobody reads the answers any more
            raise
        except Exception as error:  # noqa: BLE001
            self._fail(explained(error))
            self._draft = message
        return True

    def _fail(self, error: EmlocalError) -> None:
        self.failures += 1
        console.report(error)

    def _keep(self) -> None:
        """Writes a copy of an unsaved conversation and reports its path, if possible."""
        conversation = self.session.conversation
        if not conversation.exchanges or self._in_file == _copy_of(conversation):
            return
        try:
            path = conversation.keep(self.session.name)
            found = path.parent.parent == chat_file("x").parent
            how = "emlocal chat --resume" if found else f"emlocal chat --load {shlex.quote(str(path))}"
            console.warn(f"the conversation is saved in {path}; continue it with {how}")
        except EmlocalError as error:
            console.report(error)
        except OSError:  # the terminal is gone, so nobody can be told
            return

    def handle(self, message: str) -> None:
        """Handles one message: a command or a question."""
        if message.startswith("/") and not message.startswith("//"):
            name, _, argument = message[1:].strip().partition(" ")
            self._command(name)(argument.strip())
        else:
            text = message[1:] if message.startswith("//") else message
            self._answer(lambda turn, cancelled: self.session.ask(text, turn, cancelled))

    def _command(self, name: str) -> Callable[[str], None]:
        aliases = {"quit": "exit", "bye": "exit", "?": "help", "h": "help"}
        command = self._commands.get(aliases.get(name, name))
        if command is None:
            near = difflib.get_close_matches(name, self._commands, 2)
            hint = f"did you mean {' or '.join('/' + n for n in near)}?" if near else "/help lists them"
            raise UsageError(f"there is no command /{name}", hint)
        return command

    def _answer(
        self,
        ask: Callable[[Turn, Callable[[], bool]], Iterator[AnswerEvent]],
        method: str | None = None,
    ) -> None:
        """Answers a question and prints statistics.

        A method that does not stream shows its answer at the end.

        `method` replaces the chat's method for this answer.
        """
        turn = self.settings.turn(method)
        show = self._show_events if turn.method.streams else self._show_result
        with interruptible() as cancelled, console.no_echo():
            try:
                show(ask(turn, cancelled))
            except CancelledError:
                console.note("stopped before the first token; the question was not kept")
                return
            except EmlocalError:  # what is shown stays, on a line of its own
                self.writer.break_off()
                raise
        self.writer.end()
        if not self.quiet:
            console.note(self.session.summary())
        self.session.check_whole(quiet=self.quiet)

    def _show_events(self, events: Iterator[AnswerEvent]) -> None:
        for event in events:
            if isinstance(event, Token):
                self.writer.thought(event.reasoning)
                self.writer.piece(event.text, event.draw.entropy_before)
            elif isinstance(event, Completed):
                self.writer.piece(event.completion.tail, 0.0)
            elif isinstance(event, Piece):
                self.writer.thought(event.thought)
                self.writer.piece(event.text, event.entropy)

    def _show_result(self, events: Iterator[AnswerEvent]) -> None:
        with console.working("answering", self.quiet) as tick:
            for event in events:
                if isinstance(event, Token):
                    tick()
        self.writer.piece(self.session.conversation.exchanges[-1][1].strip("\n"), 0.0)

    def _help(self, _: str) -> None:
        console.err().print(HELP, markup=False)

    def _exit(self, _: str) -> None:
        self._done = True

    def _clear(self, _: str) -> None:
        self.session.forget()
        self._file = None  # what comes now is another conversation
        console.note("conversation cleared; the system message stays")

    def _system(self, text: str) -> None:
        if text:
            self.session.conversation.system = text
        shown = self.session.conversation.system
        console.note(
            f"system message: {shown}" if shown else "no system message is set; the template may add its own"
        )

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        if not name or not value:
            raise UsageError("/set needs a name and a value", "/set temp 0.7; /show lists the names")
        self.settings.set(name.removeprefix("--"), value.strip())

    def _show(self, _: str) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value, source in self.settings.rows():
            # not markup, even if --stop contains brackets
            cells = (Text(cell) for cell in (name, value, source))
            table.add_row(*cells, style="dim" if source == "default" else "")
        console.err().print(table)
        if not isinstance(self.session, ChatSession):
            console.note("but for the seed, defaults are not sent: the server has its own")
        console.note(f"{self.context_text()}; {self.session.name}")

    def context_text(self) -> str:
        """Returns how full the context is."""
        used, context = self.session.context_used, self.session.context
        return f"context {used:,} of {context:,} tokens" if context else f"context {used:,} tokens"

    def _stats(self, _: str) -> None:
        self._check_answered()
        console.note(self.session.summary())
        for line in self.session.details():
            console.note(line)
        totals = self.session.totals
        speed = rendering.rate(totals.generated_tokens, totals.generation_seconds)
        console.note(
            f"chat: {counted(totals.answers, 'answer')}, {counted(totals.generated_tokens, 'token')}"
            f" at {speed} tok/s; prompts {counted(totals.prompt_tokens, 'token')},"
            f" {totals.cached_tokens:,} of them cached;"
            f" {self.context_text()}"
        )

    def _check_answered(self) -> None:
        if self.session.last_turn is None:
            raise UsageError("there is no answer yet", "ask a question first")

    def _entropy(self, argument: str) -> None:
        if argument in ("on", "off"):
            self.writer = rendering.AnswerWriter(argument == "on", thoughts=self._thoughts)
            return
        if argument:
            raise UsageError(f"/entropy {argument}: it must be on, off or left out")
        self._check_answered()
        self._show_entropy(self.session.shown())

    def _show_entropy(self, tokens: list[Shown]) -> None:
        """Shows the answer in colours, where the terminal can, and its least certain tokens."""
        if not tokens:
            raise UsageError("the entropies of this answer are unknown: its server does not send them")
        writer = rendering.AnswerWriter(show_entropy=True)
        if writer.colours:
            for token in tokens:
                writer.piece(token.text, token.entropy_before)
            writer.end()
        console.note("tokens with the highest entropy:")

        def name(text: str) -> str:
            return repr(text) if text else "(end)"

        for token in sorted(tokens, key=lambda token: -token.entropy_before)[:5]:
            other = "another token" if token.instead is None else name(token.instead)
            instead = f", without EM {other}" if token.changed else ""
            line = (
                f"  {name(token.text):<16} entropy"
                f" {change(token.entropy_before, token.entropy_after, token.em)},"
                f" p {change(token.p_before, token.p_after, token.em)}{instead}"
            )
            console.err().print(line, markup=False)

    def _em(self, choice: str) -> None:
        if choice:
            self.settings.em(choice)
        console.note(f"EM: {self.settings.em_text()}")

    def _method(self, choice: str) -> None:
        if choice:
            self.settings.method(choice)
        console.note(f"method: {self.settings.method_text()}")

    def _vote(self, argument: str) -> None:
        self._answer(self.session.ask_again, f"vote:{argument}" if argument else "vote")

    def _compare(self, _: str) -> None:
        session = self.session
        if not isinstance(session, ChatSession):
            raise UsageError("/compare needs the model here", "compare on the page of emlocal serve")
        turn = self.settings.turn()
        done: list[Completion] = []
        with interruptible() as cancelled, console.working("comparing", self.quiet) as tick:
            try:
                for event in session.compare(turn, cancelled):
                    if isinstance(event, Completed):
                        done.append(event.completion)
                    elif isinstance(event, Token):
                        tick()
            except CancelledError:
                console.note("stopped")
                return
        done.sort(key=lambda completion: completion.sample)
        rendering.show_comparison(done[0], done[1], session.backend)
        if not self.quiet:
            took = session.timings
            speed = rendering.rate(took.generated_tokens, took.generation_seconds)
            console.note(f"both together {speed} tok/s · seed {turn.plan.seed}")

    def _regen(self, _: str) -> None:
        self._answer(self.session.ask_again)

    def _undo(self, _: str) -> None:
        question, _answer = self.session.take_back()
        self.session.drop_last()
        console.note(f"removed: {_shortened(question)}")

    def _edit(self, text: str) -> None:
        question, answer = self.session.take_back()
        if text:
            exchanges = self.session.conversation.exchanges
            before = len(exchanges)
            try:
                self._answer(lambda turn, cancelled: self.session.ask(text, turn, cancelled))
            finally:
                if len(exchanges) == before:  # the new question got no answer, so the old exchange stays
                    exchanges.append((question, answer))
        elif self.reader.interactive:
            self._draft = question
        else:
            self.session.conversation.exchanges.append((question, answer))
            raise UsageError("/edit needs the new text if stdin is not a terminal", "/edit What is 17*4?")

    def _save(self, name: str) -> None:
        path = chat_file(name) if name else self._file or new_file()
        replaced = path.is_file() and path != self._file
        self.session.conversation.save(path, self.session.name)
        self._in_file, self._file = _copy_of(self.session.conversation), path
        count = counted(len(self.session.conversation.exchanges), "exchange")
        console.note(f"saved {count} to {path}{', in place of the file of that name' if replaced else ''}")

    def _load(self, name: str) -> None:
        path = chat_file(name) if name else newest_saved()
        self.session.conversation = Conversation.load(path)
        self._in_file, self._file = _copy_of(self.session.conversation), path
        self.session.drop_last()
        console.note(f"loaded {counted(len(self.session.conversation.exchanges), 'exchange')} from {path}")


def _copy_of(conversation: Conversation) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    return conversation.system, tuple(conversation.exchanges)


def _shortened(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else ""
    return first if len(first) <= 60 else first[:57] + "…"
