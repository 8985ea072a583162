"""The command line: its verbs, and how errors are reported."""

import os
import traceback
from importlib import import_module
from typing import Annotated

import typer

from emlocal import __version__
from emlocal.cli import usage
from emlocal.errors import CancelledError, EmlocalError, explained

PANELS: dict[str, dict[str, str]] = {
    "Ask": {
        "generate": "Answer one prompt.",
        "chat": "Chat with a model. Type /help inside to list the commands.",
        "batch": "Answer a file of prompts. A killed run resumes where it stopped.",
        "serve": "Serve a model over HTTP to any client of OpenAI's API.",
    },
    "Train": {
        "finetune": "Fine-tune a LoRA adapter on the model's own answers (EM-FT).",
        "rl": "Train a LoRA adapter with negative entropy as the reward (EM-RL).",
    },
    "Judge": {
        "eval": "Compare decoding methods: accuracy with confidence intervals, and cost.",
        "plot": "Plot training runs, evaluations or traces; with -o as a picture.",
    },
    "Manage": {
        "models": "List, fetch, show and remove models.",
        "adapter": "Show, convert and merge LoRA adapters.",
        "doctor": "Check this machine: engines, model, folders and settings.",
        "bench": "Measure speed and the cost of entropy minimization.",
    },
}
"""The verbs as `emlocal --help` groups them."""

VERBS = {name: summary for verbs in PANELS.values() for name, summary in verbs.items()}
"""The verbs. Each is a module in emlocal.cli, imported only if it is the one to run."""

GROUPS = ("models", "adapter")
"""Verbs with verbs of their own."""

EXAMPLES: dict[str, tuple[str, str]] = {
    "generate": (
        'emlocal generate "What is 17*4?"',
        'emlocal generate --em-inf --show-entropy "What is 17*4?"',
    ),
    "chat": ("emlocal chat", "emlocal chat -m qwen2.5:0.5b --em-inf --system 'Be brief.'"),
    "batch": (
        "emlocal batch prompts.jsonl -o answers.jsonl",
        "emlocal batch prompts.jsonl -o votes.jsonl --method vote -n 8",
    ),
    "serve": (
        "emlocal serve -m smollm2:135m",
        "emlocal serve -m qwen2.5:0.5b --em-inf --parallel 8 --port 8080",
    ),
    "finetune": (
        "emlocal finetune --data prompts.txt -o adapter --dry-run",
        "emlocal finetune --data prompts.txt -o adapter --steps 12",
    ),
    "rl": (
        "emlocal rl --data prompts.txt -o adapter --dry-run",
        "emlocal rl --data prompts.txt -o adapter --samples 4 --steps 12",
    ),
    "eval": (
        "emlocal eval --task gsm8k --data gsm8k.jsonl --methods greedy,em-inf --limit 100",
        "emlocal eval --task gsm8k --data gsm8k.jsonl --methods greedy,vote:8 -o votes",
    ),
    "plot": ("emlocal plot adapter", "emlocal plot eval-gsm8k-model -o accuracy.png"),
    "models": ("emlocal models list", "emlocal models pull smollm2:135m"),
    "models list": ("emlocal models list", "emlocal models list --json"),
    "models pull": ("emlocal models pull smollm2:135m", "emlocal models pull org/name:Q4_K_M"),
    "models show": ("emlocal models show smollm2:135m", "emlocal models show model.gguf --json"),
    "models rm": ("emlocal models rm smollm2:135m", "emlocal models rm smollm2:135m --yes"),
    "models path": ("emlocal models path smollm2:135m", "emlocal models path org/name:Q4_K_M"),
    "adapter": ("emlocal adapter show adapter", "emlocal adapter convert adapter -o mlx --to mlx"),
    "adapter show": ("emlocal adapter show adapter", "emlocal adapter show adapter --base model.gguf"),
    "adapter convert": (
        "emlocal adapter convert adapter -o adapter.gguf --base model.gguf",
        "emlocal adapter convert adapter -o mlx --to mlx",
    ),
    "adapter merge": (
        "emlocal adapter merge -m org/name --adapter adapter -o merged",
        "emlocal adapter merge -m model.gguf --adapter adapter=0.5 -o merged",
    ),
    "doctor": ("emlocal doctor", "emlocal doctor --json"),
    "bench": ("emlocal bench", "emlocal bench -m model.gguf --tokens 64 --rounds 10"),
}
"""Two commands at the end of each verb's help."""


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"emlocal {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; also works after the verb.")
    ] = False,
) -> None:
    """Run language models on your own machine, with entropy minimization."""


def _unused() -> None:
    """Placeholder for a verb that the help lists."""


def build(arguments: list[str]) -> typer.Typer:
    """Builds the typer app for these arguments.

    Only their verb is loaded; the others are entries of the help.
    """
    app = typer.Typer(
        name="emlocal",
        cls=usage.Group,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    words = _to_complete() or arguments
    chosen = next((a for a in words if not a.startswith("-")), None)
    for panel, verbs in PANELS.items():
        for name, summary in verbs.items():
            if name == chosen:
                _add(app, name, panel)
            else:
                app.command(name, help=summary, rich_help_panel=panel)(_unused)
    return app


def _add(app: typer.Typer, name: str, panel: str) -> None:
    """Adds one verb or group of verbs with its module."""
    module = import_module(f"emlocal.cli.{name}")
    if name in GROUPS:
        for command in module.app.registered_commands:
            command.cls = usage.Command
            command.epilog = _epilog(f"{name} {command.name or command.callback.__name__}")
        app.add_typer(module.app, name=name, cls=usage.Group, epilog=_epilog(name), rich_help_panel=panel)
    else:
        from emlocal.cli.options import Verb  # with the settings, which the list of verbs does not need

        app.command(name, cls=Verb, epilog=_epilog(name), rich_help_panel=panel)(vars(module)[name])


def _epilog(verb: str) -> str | None:
    """Returns the examples, each on its own line."""
    return "\n".join(["Examples:", *EXAMPLES[verb]]) if verb in EXAMPLES else None


def _to_complete() -> list[str]:
    """Returns the words after `emlocal` that a shell asks to complete; none in an ordinary run."""
    if "_EMLOCAL_COMPLETE" not in os.environ:
        return []
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return typed.split()[1:]


def run(arguments: list[str]) -> int:
    """Runs the command line. Returns the exit code: 0, 1 for run-time errors, 2 for usage, 130 for Ctrl-C."""
    debug = "--debug" in arguments or bool(os.environ.get("EMLOCAL_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    try:
        code = build(arguments)(arguments, standalone_mode=False, prog_name="emlocal")
    except EmlocalError as error:
        if debug:
            traceback.print_exc()
        _report(error)
        return error.exit_code
    except (KeyboardInterrupt, CancelledError):
        return 130
    except typer.Abort:  # the answer "no" to a question
        return 1
    except Exception as error:  # noqa: BLE001
        if usage.asks_for_help(error):
            typer.echo(error, err=True)
            return 2
        if debug:
            traceback.print_exc()
        said = usage.explained(error) if usage.is_usage(error) else explained(error)
        _report(said)
        return said.exit_code
    return int(code or 0)


def _report(error: EmlocalError) -> None:
    from emlocal.console import report

    report(error)
