"""Three hundred attacks from within the sandbox: each is refused, and nothing outside has changed.

`sandbox/*.py` has the attacks by kind. An attack that fails for any other reason than the sandbox's refusal
fails the test too, because it proves nothing. Those marked `proven` are also shown to work without the
sandbox.
"""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from emlocal.sandbox import landlock, run, seccomp
from emlocal.sandbox.run import Limits
from tests.attack.calls import numbers
from tests.attack.sandbox.victims import SECRET, Victims, victims

pytestmark = pytest.mark.skipif(
    landlock.abi() < landlock.OLDEST_ABI or not seccomp.known(), reason="needs Landlock (Linux 6.2)"
)
FOLDER = Path(__file__).with_name("sandbox")
KINDS = ("processes", "others", "sharing", "files", "devices", "network")
_MARKED = re.compile(r"^@(?:attack|proven)\ndef (\w+)", re.MULTILINE)
_COME_OF_ALL = """
import sys as _sys

def _come_of_all(names, keep=None):
    came = {}
    for name in names:
        came[name] = come_of(name)
        for number in range(3, 64):
            if number != keep:
                try:
                    os.close(number)
                except OSError:
                    pass
    return came
"""


@pytest.fixture
def others(tmp_path: Path) -> Iterator[Victims]:
    with victims(tmp_path) as found:
        yield found


def program(kind: str, told: dict[str, object]) -> str:
    """Returns a file of attacks as one text, after the code that it needs."""
    prelude, attacks = (FOLDER.joinpath(f"{name}.py").read_text() for name in ("prelude", kind))
    attacks = re.sub(r"^from tests\.attack\.sandbox\.prelude import .*\n", "", attacks, flags=re.MULTILINE)
    given = f"NUMBERS.update({numbers(platform.machine())!r})\nVICTIM.update({told!r})\n"
    return prelude + given + attacks + _COME_OF_ALL


def names(kind: str) -> list[str]:
    return _MARKED.findall(FOLDER.joinpath(f"{kind}.py").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_no_attack_succeeds(kind: str, others: Victims) -> None:
    judge = (
        f"came = _come_of_all(ATTACKS, int(_sys.argv[1]))\nassert list(came) == {names(kind)!r}\n"
        "came = {name: what for name, what in came.items() if what != 'refused'}\nassert not came, came"
    )
    outcome = run.run(program(kind, others.told) + judge, Limits(seconds=30))
    assert outcome.detail == ""
    assert outcome.passed
    others.unharmed()
    assert others.say() == SECRET


@pytest.mark.parametrize("kind", KINDS)
def test_they_would_succeed_without_the_sandbox(kind: str, others: Victims) -> None:
    """Otherwise the test above could not fail."""
    told = {**others.told, "readable": others.told["file"]}
    judge = "import json\nprint(json.dumps(_come_of_all(PROVEN)), flush=True)\nos._exit(0)"
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", program(kind, told) + judge],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        check=True,
        timeout=60,
    )
    came = json.loads(done.stdout)
    assert len(came) >= 2
    assert {name: what for name, what in came.items() if what != "did it"} == {}


def test_there_are_as_many_attacks_as_promised() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "evaluation.md").read_text(encoding="utf-8")
    proven = sum(FOLDER.joinpath(f"{kind}.py").read_text().count("\n@proven\n") for kind in KINDS)
    assert sum(len(names(kind)) for kind in KINDS) >= 300
    assert f"three hundred attacks on this, {proven} of which are shown to work without the sandbox" in page


@pytest.mark.attack
@pytest.mark.parametrize("kind", KINDS)
def test_no_attack_succeeds_on_its_own(kind: str, others: Victims) -> None:
    """Runs each in a fresh interpreter, so that no other attack prepared the ground or took what it needs."""
    came = {}
    for name in names(kind):
        judge = f"came = come_of({name!r})\nassert came == 'refused', came"
        came[name] = run.run(program(kind, others.told) + judge, Limits(seconds=30))
    assert {name: outcome for name, outcome in came.items() if not outcome.passed} == {}
    others.unharmed()
    assert others.say() == SECRET
