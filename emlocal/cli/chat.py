"""`emlocal chat`: a conversation in a terminal or a pipe."""

import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from emlocal.cli.options import EMOptions, EngineOptions, OutputOptions, Preset, SamplingOptions, with_options
from emlocal.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emlocal.chat.session import Turn
    from emlocal.cli.precedence import Config, Sampling


@with_options
def chat(
    system: Annotated[str | None, typer.Option("--system", help="System message.", metavar="TEXT")] = None,
    load: Annotated[
        str | None, typer.Option("--load", help="Go on with a saved conversation.", metavar="NAME")
    ] = None,
    output: OutputOptions = OutputOptions(),
    em: EMOptions = EMOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    engine: EngineOptions = EngineOptions(),
) -> None:
    """Talk with a model. /help inside lists the commands."""
    from emlocal.chat.conversation import Conversation, chat_file
    from emlocal.chat.reading import PipeReader, TerminalReader
    from emlocal.chat.repl import Repl
    from emlocal.chat.session import ChatSession
    from emlocal.cli import precedence
    from emlocal.cli.views import open_backend
    from emlocal.models.paths import data_dir

    if output.trace is not None:
        raise UsageError("--trace belongs to emlocal generate")
    config = precedence.read_config()
    precedence.sampling(sampling, em, config, {})  # what contradicts itself fails before a model is loaded
    seed = precedence.seed(sampling, config.sampling)
    conversation = Conversation.load(chat_file(load)) if load else Conversation()
    if system is not None:
        conversation.system = system
    with open_backend(precedence.merged(engine, config.engine), sequences=4, quiet=output.quiet) as backend:
        settings = ChatSettings(replace(sampling, seed=seed), em, config, backend.info.sampling)
        session = ChatSession(backend, conversation)

        def status() -> str:
            used = f"{session.context_used():,}/{backend.context:,} tokens"
            return f"{backend.info.name} · EM {settings.em_text()} · {used}"

        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        commands = ["help", "exit", "clear", "system", "set", "show", "stats", "entropy", "em"]
        commands += ["compare", "regen", "undo", "edit", "save", "load"]
        reader = TerminalReader(data_dir() / "chat_history", commands, status) if terminal else PipeReader()
        repl = Repl(session, settings, reader, show_entropy=output.show_entropy, quiet=output.quiet)
        repl.run()
    if repl.failures and not terminal:
        raise typer.Exit(1)


class ChatSettings:
    """The flags, as /set and /em change them."""

    def __init__(
        self, sampling: SamplingOptions, em: EMOptions, config: "Config", model: "Mapping[str, float]"
    ) -> None:
        self._sampling = sampling
        self._em = em
        self._config = config
        self._model = model
        self._resolve(sampling, em)

    def _resolve(self, sampling: SamplingOptions, em: EMOptions) -> "Sampling":
        from emlocal.cli import precedence

        return precedence.sampling(sampling, em, self._config, self._model)

    def turn(self) -> "Turn":
        from emlocal.chat.session import Turn
        from emlocal.cli import precedence

        most, stop = precedence.limits(self._sampling, self._config.sampling)
        seed = precedence.seed(self._sampling, self._config.sampling)
        return Turn(self._resolve(self._sampling, self._em).params, seed, most, stop)

    def set(self, name: str, value: str) -> None:
        from emlocal.cli import precedence

        sampling = precedence.with_text(self._sampling, name, value)
        em = precedence.with_text(self._em, name, value)
        if sampling is None and em is None:
            names = [*precedence.flag_names(SamplingOptions), *precedence.flag_names(EMOptions)]
            raise precedence.unknown_setting(name, names)
        sampling, em = sampling or self._sampling, em or self._em
        try:
            self._resolve(sampling, em)
            precedence.limits(sampling, self._config.sampling)
            precedence.seed(sampling, self._config.sampling)
        except UsageError as error:
            raise _in_words_of_set(error) from None
        self._sampling, self._em = sampling, em

    def em(self, choice: str) -> None:
        if choice == "off":
            self._em = EMOptions(em_inf=False)
        elif choice == "on":  # what belongs to adaptive temperature goes with it
            self._em = replace(self._em, em_inf=True, adaptive_temperature=None, em_ratio=None)
        elif choice in list(Preset):
            self._em = EMOptions(em_preset=Preset(choice))
        else:
            raise UsageError(f"/em {choice}: it takes on, off, or a preset ({', '.join(Preset)})")

    def em_text(self) -> str:
        from emlocal.settings import describe_em

        return describe_em(self._resolve(self._sampling, self._em).params.em)

    def rows(self) -> list[tuple[str, str, str]]:
        from emlocal.settings import SamplingParams, settings_of

        resolved = self._resolve(self._sampling, self._em)
        flags = settings_of(SamplingParams)
        rows = [
            (flags[name].flag.removeprefix("--"), f"{vars(resolved.params)[name]:g}", source)
            for name, source in resolved.sources.items()
        ]
        turn = self.turn()
        rows += [("max-tokens", str(turn.max_tokens), ""), ("seed", str(turn.seed), "")]
        rows += [("stop", repr(text), "") for text in turn.stop]
        return [*rows, ("em", self.em_text(), "")]


def _in_words_of_set(error: UsageError) -> UsageError:
    """An error that speaks of flags, as /set has it: names without dashes, and no --no-."""

    def named(text: str) -> str:
        return re.sub(r"--([a-z][a-z-]*)", r"\1", re.sub(r"--no-([a-z-]+)", r"\1 false", text))

    return UsageError(named(error.message), named(re.sub(r"^add --([a-z-]+)$", r"/set \1 true", error.hint)))
