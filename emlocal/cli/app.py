"""The command line: its verbs, and what happens when something goes wrong."""

import os
import traceback
from typing import Annotated

import typer

from emlocal import __version__
from emlocal.cli import bench, chat, doctor, generate, models
from emlocal.console import report
from emlocal.errors import EmlocalError

app = typer.Typer(
    name="emlocal",
    help="Entropy minimization for language models on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.add_typer(models.app, name="models")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"emlocal {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; works after the verb too.")
    ] = False,
) -> None:
    pass


def run(arguments: list[str]) -> int:
    """Run the command line; the exit code (0, 1 run time, 2 usage, 130 Ctrl-C)."""
    debug = "--debug" in arguments or bool(os.environ.get("EMLOCAL_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except EmlocalError as error:
        if debug:
            traceback.print_exc()
        report(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):  # at a question; typer itself answers 130 elsewhere
        return 130
    except Exception as error:  # noqa: BLE001
        if type(error).__module__.startswith(("click", "typer")):  # wrong usage: it knows how to say so
            error.show()  # type: ignore[attr-defined]
            return 2
        if debug:
            traceback.print_exc()
        report(EmlocalError(f"unexpected {type(error).__name__}: {error}", "a defect; --debug shows where"))
        return 1
    return int(code or 0)
