"""The examples of docs/python.md run, in order, in one session."""

from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "python.md"


@pytest.mark.real
def test_the_examples_run(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session: dict[str, Any] = {}
    for line, block in blocks(PAGE, "python"):
        source = "\n" * (line - 1) + block  # gives a traceback the page's line numbers
        exec(compile(source, str(PAGE), "exec"), session)  # noqa: S102
    said = capsys.readouterr().out
    assert "the prompt is empty" in said
    assert "set a larger --context" in said
    assert session["row"]["votes"] >= 1
    assert session["tuned"].outcome.steps == 1
    assert [method.name for method in session["found"].methods] == ["greedy", "em-inf"]
