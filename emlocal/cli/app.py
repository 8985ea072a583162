"""The command line: its verbs, and what happens when something goes wrong."""

import os
import traceback
from importlib import import_module
from typing import Annotated

import typer

from emlocal import __version__
from emlocal.errors import CancelledError, EmlocalError, explained

VERBS = {
    "generate": "Answer one prompt.",
    "chat": "Talk with a model. /help inside lists the commands.",
    "batch": "Answer a file of prompts; killed runs go on where they stopped.",
    "finetune": "Fine-tune a LoRA adapter on the entropy of the model's own answers (EM-FT).",
    "rl": "Train a LoRA adapter by reinforcement, with negative entropy as the only reward (EM-RL).",
    "plot": "Draw training runs, evaluations or traces: a picture with -o, else on the terminal.",
    "eval": "Compare ways of answering on problems with known answers: accuracy, cost, and how sure that is.",
    "models": "List, fetch, inspect and remove models.",
    "adapter": "Show, convert and merge LoRA adapters.",
    "doctor": "Check this machine: engine, model, folders, settings.",
    "bench": "Measure speed on this machine, and what entropy minimization costs.",
}
"""Each verb is the module of its name in emlocal.cli, imported only when it is the one to run."""

GROUPS = ("models", "adapter")
"""Verbs that have verbs of their own."""


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"emlocal {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; works after the verb too.")
    ] = False,
) -> None:
    """Entropy minimization for language models on your own machine."""


def _unused() -> None:
    """Stands for a verb that is only listed."""


def build(arguments: list[str]) -> typer.Typer:
    """The typer app for these arguments: their verb for real, the others as entries of the help."""
    app = typer.Typer(
        name="emlocal",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    for name, summary in VERBS.items():
        if name != chosen:
            app.command(name, help=summary)(_unused)
            continue
        module = import_module(f"emlocal.cli.{name}")
        if name in GROUPS:
            app.add_typer(module.app, name=name)
        else:
            from emlocal.cli.options import Verb  # with the settings, which the list of verbs does not need

            app.command(name, cls=Verb)(vars(module)[name])
    return app


def run(arguments: list[str]) -> int:
    """Run the command line; the exit code (0, 1 run time, 2 usage, 130 Ctrl-C)."""
    debug = "--debug" in arguments or bool(os.environ.get("EMLOCAL_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    try:
        code = build(arguments)(arguments, standalone_mode=False)
    except EmlocalError as error:
        if debug:
            traceback.print_exc()
        _report(error)
        return error.exit_code
    except (KeyboardInterrupt, CancelledError):
        return 130
    except typer.Abort:  # "no" to a question
        return 1
    except Exception as error:  # noqa: BLE001
        if type(error).__module__.startswith("typer"):  # wrong usage: it knows how to say so
            error.show()  # type: ignore[attr-defined]
            return 2
        if debug:
            traceback.print_exc()
        _report(explained(error))
        return 1
    return int(code or 0)


def _report(error: EmlocalError) -> None:
    from emlocal.console import report

    report(error)
