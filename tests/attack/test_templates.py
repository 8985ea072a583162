"""Hostile chat templates: none exceeds its time or memory, gets at Python, or reaches the terminal."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from emlocal.errors import UsageError
from emlocal.models.template_worker import MAX_MEMORY, MAX_MESSAGE, MAX_SECONDS
from emlocal.models.templates import render
from tests.attack.templates import BUILDS, SAYING, attacks

HIDDEN = "what-the-environment-holds"
WALK = f"""
import json, resource, sys, time
from emlocal.errors import ModelError, UsageError
from emlocal.models import templates, templates
from emlocal.models.templates import render
templates.MAX_SECONDS = float(sys.argv[1])
for line in sys.stdin:  # one by one: what this process holds counts for those that it starts
    name, template = json.loads(line)
    started = time.monotonic()
    try:
        kind, said = "text", render(template, [{{"role": "user", "content": "hi"}}])
    except UsageError as why:
        kind, said = "refused", why.message
    except ModelError as why:
        kind, said = "error", why.message
    clean = kind == "text" or (said.isprintable() and len(said) < {MAX_MESSAGE} + 100)
    seconds = time.monotonic() - started
    print(json.dumps([name, kind, said[:1000], clean, "{HIDDEN}" in said, seconds]), flush=True)
templates._process.close()  # so that the system has counted it
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit]))
"""


@dataclass(frozen=True)
class Told:
    """The result of a template."""

    kind: str
    said: str
    """The first 1,000 characters."""
    clean: bool
    leaked: bool
    seconds: float


def walk(templates: dict[str, str], seconds: float, timeout: float) -> tuple[dict[str, Told], int]:
    """Returns each template's result, and the peak memory (bytes) of their processes."""
    done = subprocess.run(
        [sys.executable, "-c", WALK, str(seconds)],
        input="".join(json.dumps(item) + "\n" for item in templates.items()),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "EM_HIDDEN": HIDDEN},
    )
    *told, [peak] = (json.loads(line) for line in done.stdout.splitlines() or ["[0]"])
    assert done.returncode == 0, (told[-1:], done.stderr[-1000:])
    assert len(told) == len(templates)
    return {name: Told(*rest) for name, *rest in told}, peak


def check(told: dict[str, Told], peak: int) -> None:
    """Checks what must be true on a busy machine too.

    A template that is not stopped meets the limit of `walk`.
    """
    assert peak < MAX_MEMORY
    for name, one in told.items():
        assert one.clean, (name, one)
        assert not one.leaked, (name, one)


@pytest.mark.attack
def test_all_attacks() -> None:
    """Takes several minutes: many templates use their two seconds.

    It is the only test that looks at a clock, and is not among those that must pass on a busy machine.
    """
    told, peak = walk(attacks(), MAX_SECONDS, 3600)
    check(told, peak)
    assert max(one.seconds for one in told.values()) < MAX_SECONDS + 5
    for name, one in sorted(told.items(), key=lambda item: item[1].seconds):
        print(f"{one.seconds:6.2f} s  {name}: {one.kind}, {one.said[:100]!r}")
    print(f"peak {peak / 1e6:.0f} MB")


def test_one_of_each_kind() -> None:
    """Tests a part of each family, with less time than the two seconds."""
    every = attacks()
    builds = list(BUILDS)
    chosen = {name: text for name, text in every.items() if name.split(": ")[0] in ("internals", "saying")}
    uses = [name.split(": ")[1] for name in every if name.startswith(f"shared {builds[0]}: ")]
    for i, use in enumerate(uses[::4]):
        name = f"shared {builds[i % len(builds)]}: {use}"
        chosen[name] = every[name]
    for family in ("strings", "integers", "loops", "compilation"):
        members = [name for name in every if name.startswith(f"{family}: ")]
        chosen |= {name: every[name] for name in members[::8]}
    told, peak = walk(chosen, 0.15, 300)
    check(told, peak)
    assert len(chosen) > 150
    kinds = {one.kind for one in told.values()}
    assert kinds == {"text", "refused", "error"}
    assert any("more than 0.15 seconds" in one.said for one in told.values())


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("escapes", "�]0;title��[31mred"),
        ("controls", "a ��\ufffd31mb"),
        ("long", "a" * (MAX_MESSAGE - 1) + "…"),
        ("long, of lines", ("a " * MAX_MESSAGE)[: MAX_MESSAGE - 1] + "…"),
        ("half a character", "�"),
        ("the other way", "a�b"),
        ("none", "None"),
    ],
)
def test_what_a_template_says_is_one_short_line(name: str, shown: str) -> None:
    with pytest.raises(UsageError) as caught:
        render(SAYING[name], [{"role": "user", "content": "hi"}])
    assert caught.value.message == f"the model's chat template refuses this conversation: {shown}"
