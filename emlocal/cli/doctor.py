"""The command `emlocal doctor`: what this machine has, what is missing, and the command that fixes it."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from emlocal import __version__, console
from emlocal.errors import EmlocalError

if TYPE_CHECKING:
    from emlocal.diagnosis import Finding

_STYLES = {"ok": "green", "info": "dim", "warn": "yellow", "fail": "bold red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of lines.")] = False,
) -> None:
    """Check this machine: engines, model, folders and settings.

    Exits with 0 if `emlocal chat` works here, with 1 if it does not.
    """
    findings = []
    for finding in _examine():
        findings.append(finding)
        if not as_json:
            _show(finding)
    failed = [finding.name for finding in findings if finding.status == "fail"]
    if as_json:
        checks = {
            f.name: {"status": f.status, "text": f.text, "fix": list(f.fix)} | f.facts for f in findings
        }
        console.print_json({"emlocal": __version__, "ok": not failed, "checks": checks})
    else:
        _conclude(findings, failed)
    if failed:
        raise typer.Exit(1)


def _examine() -> Iterator["Finding"]:
    """Yields all findings in the order in which they are shown."""
    from emlocal import diagnosis as checks

    yield from _safely("system", checks.system)
    yield from _safely("processor", checks.processor)
    yield from _safely("memory", checks.memory)
    yield from _safely("python", checks.python)
    yield from checks.variables()
    yield from _safely("numpy", checks.numpy)
    yield from _safely("sampler", checks.sampler)
    yield from checks.engines()
    yield from checks.gpu()
    yield from _safely("compiler", checks.compiler)
    yield from _places()
    yield from _safely("model", checks.model)
    yield from _safely("config", _config)


def _safely(name: str, check: Callable[[], "Finding"]) -> Iterator["Finding"]:
    """Runs a check and yields its finding; if the check cannot run, that is a failed finding."""
    from emlocal.diagnosis import Finding

    try:
        yield check()
    except EmlocalError as why:
        yield Finding(name, "fail", why.message, (why.hint,) if why.hint else ())
    except (ImportError, OSError) as why:
        yield Finding(name, "fail", f"{type(why).__name__}: {why}")


def _places() -> Iterator["Finding"]:
    from emlocal import files
    from emlocal.diagnosis import hub_cache, place

    yield place("cache", files.cache_dir(), "EMLOCAL_CACHE_DIR", "the starter model cannot be fetched")
    yield place("data", files.data_dir(), "EMLOCAL_DATA_DIR", "conversations cannot be saved there")
    yield from _safely("hub cache", hub_cache)


def _config() -> "Finding":
    """Checks the config file: it exists, and all its values are valid."""
    from emlocal.diagnosis import Finding
    from emlocal.settings import resolve_settings
    from emlocal.settings.resolve import config_path, read_config

    path = config_path()
    facts = {"path": str(path), "exists": path.exists()}
    resolve_settings(("config", read_config()))
    if not path.exists():
        return Finding("config", "info", f"none; emlocal reads {path} if it exists", facts=facts)
    return Finding("config", "ok", str(path), facts=facts)


def _show(finding: "Finding") -> None:
    from rich.text import Text

    line = Text(f"{finding.status:<5}", style=_STYLES[finding.status])
    line.append(f"{finding.name:<11}", style="bold")
    line.append(finding.text, style="default")
    for fix in finding.fix:
        line.append(f"\n{'':<16}→ {fix}", style="cyan")
    console.out().print(line)


def _conclude(findings: Sequence["Finding"], failed: Sequence[str]) -> None:
    if failed:
        console.out().print(f"\nchat does not work here yet: see {', '.join(failed)}", style="bold red")
        return
    warnings = [finding.name for finding in findings if finding.status == "warn"]
    also = f" (warnings: {', '.join(warnings)})" if warnings else ""
    console.out().print(f"\nchat works here{also}; try: emlocal chat", style="bold green")
