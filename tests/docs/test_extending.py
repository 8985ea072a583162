"""The examples of docs/extending.md work: each in a copy with one changed file, on real engines."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import emlocal
from emlocal.models.resolve import GGUFModel
from tests.docs.pages import ROOT, Command, blocks, commands
from tests.docs.test_commands import SECONDS, run

PAGE = ROOT / "docs" / "extending.md"
LONGEST, SHORTEST = 50, 10
"""Maximum and minimum lines of code in an example."""

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(shutil.which("bash") is None, reason="the page's commands are written for bash"),
]


@dataclass
class Example:
    """One section of the page."""

    title: str
    files: dict[str, str] = field(default_factory=dict)
    """New files, by their paths in the repository."""
    changes: dict[str, list[str]] = field(default_factory=dict)
    """Lines of a diff, by the file that they change."""
    scripts: list[str] = field(default_factory=list)


def sections() -> dict[str, tuple[int, int]]:
    """Returns the first and last line of each section, by its heading."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    starts = [(number, line[3:]) for number, line in enumerate(lines, start=1) if line.startswith("## ")]
    ends = [*(number for number, _ in starts[1:]), len(lines) + 1]
    return {title: (first, end) for (first, title), end in zip(starts, ends, strict=True)}


def example(title: str) -> Example:
    first, end = sections()[title]
    found = Example(title)
    for number, block in blocks(PAGE, "python"):
        if first <= number < end:
            path = re.match(r"# (emlocal/\S+\.py)\n", block)
            if path is None:
                found.scripts.append(block)
            else:
                found.files[path[1]] = block.removeprefix(path[0])
    for number, block in blocks(PAGE, "diff"):
        if first <= number < end:
            head, *changed = block.splitlines()
            found.changes[head.removeprefix("--- ")] = changed
    return found


EXAMPLES = {title: example(title) for title in ("An EM step", "A method", "An engine", "A verb")}


def changed(text: str, lines: list[str]) -> str:
    """Returns the text with each line marked + added after the last unmarked one."""
    found = text.splitlines()
    at = None
    for line in lines:
        mark, content = line[:1], line[1:]
        if mark == "+":
            assert at is not None, "a change begins with the line before it"
            found.insert(at, content)
            at += 1
        else:
            assert mark == " ", line
            assert found.count(content) == 1, f"{content!r} is not there once"
            at = found.index(content) + 1
    return "\n".join(found) + "\n"


def built(wanted: Example, home: dict[str, str], place: Path) -> dict[str, str]:
    """Returns the environment of a copy of the package that contains the example."""
    shutil.copytree(
        Path(emlocal.__file__).parent, place / "emlocal", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name, source in wanted.files.items():
        assert not (place / name).exists(), f"{name} is there already"
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(source, encoding="utf-8")
    for name, lines in wanted.changes.items():
        text = (place / name).read_text(encoding="utf-8")
        (place / name).write_text(changed(text, lines), encoding="utf-8")
    return {**home, "PYTHONPATH": str(place)}


def test_each_example_is_short_and_changes_one_file() -> None:
    assert [*sections()] == [*EXAMPLES]
    for title, found in EXAMPLES.items():
        (lines,) = found.changes.values()
        added = [line[1:] for line in lines if line.startswith("+")]
        assert len([line for line in added if not line.startswith("from ")]) == 1, title
        code = [line for text in found.files.values() for line in text.splitlines() if line.strip()]
        assert SHORTEST <= len(code) <= LONGEST, f"{title}: {len(code)} lines"


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_example_works(title: str, home: dict[str, str], tmp_path: Path) -> None:
    wanted, environment = EXAMPLES[title], built(EXAMPLES[title], home, tmp_path / "house")
    first, end = sections()[title]
    folder = tmp_path / "run"
    folder.mkdir()
    said = {
        command.text: run(PAGE.name, command, environment, folder)
        for command in commands(PAGE)
        if first <= command.line < end
    }
    for script in wanted.scripts:
        python(script, environment, folder)
    CHECKS[title](folder, said)


def python(script: str, environment: dict[str, str], folder: Path) -> None:
    """Runs a script in the copy of the package."""
    done = subprocess.run(
        [sys.executable, "-"],
        cwd=folder,
        env=os.environ | environment,
        input=script,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"


EVERYWHERE = """
import io, json, sys
from pathlib import Path

import emlocal
from emlocal.cli.app import run
from emlocal.em.steps.sharpen import Sharpen

model = ["-m", MODEL, "--backend", ENGINE, "--max-tokens", "6"]
Path("lines.jsonl").write_text(json.dumps({"prompt": "the", "sharpen": True, "em_power": 3}))
Path("sums.jsonl").write_text(json.dumps({"prompt": "the", "answer": "1"}))

def touched(entropy):
    assert entropy["touched"] == 1 and entropy["mean_after"] < entropy["mean_before"], entropy

sys.stdout = io.StringIO()
assert run(["generate", *model, "--sharpen", "--em-power", "3", "--json", "the"]) == 0
touched(json.loads(sys.stdout.getvalue())["entropy"])
assert run(["batch", "lines.jsonl", "-o", "rows.jsonl", "-q", *model]) == 0
touched(json.loads(Path("rows.jsonl").read_text())["entropy"])
task = ["--task", "questions", "--data", "sums.jsonl", "--methods", "sharpen:3"]
assert run(["eval", *task, "-o", "compared", *model]) == 0
assert "p^3" in json.loads(Path("compared/results.json").read_text())["methods"][0]["settings"]
with emlocal.load(MODEL, backend=ENGINE) as loaded:
    assert loaded.backend.name == ENGINE
    answer = loaded.generate("the", em=Sharpen(power=3), max_tokens=6)
    assert answer.tokens == loaded.generate("the", sharpen=True, em_power=3, max_tokens=6).tokens
assert answer.entropy.touched == 1
"""
"""The step on one engine: by flag, batch line, name in an evaluation, and Python."""


@pytest.mark.parametrize("engine", ["llama.cpp", "torch", "mlx"])
def test_the_step_works_everywhere_on_every_engine(
    engine: str, home: dict[str, str], tiny_model: GGUFModel, tmp_path: Path
) -> None:
    environment = built(EXAMPLES["An EM step"], home, tmp_path / "house")
    python(f"MODEL, ENGINE = {str(tiny_model.path)!r}, {engine!r}\n{EVERYWHERE}", environment, tmp_path)
    chat = f"emlocal chat -m {tiny_model.path} --backend {engine} --max-tokens 6"
    typed = ("/set sharpen true", "/set em-power 3", "the", "/show")
    said = run(PAGE.name, Command(0, chat, typed), environment, tmp_path)
    assert "p^3 above 0.3 nats" in said
    assert "EM touched 100% of tokens" in said


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_step(folder: Path, said: dict[str, str]) -> None:
    """Checks that both engines used the step, and so did a line, a method and a chat."""
    answers = [read(folder / f"{engine}.json") for engine in ("llama", "torch")]
    assert [answer["backend"] for answer in answers] == ["llama.cpp", "torch"]
    for answer in answers:
        entropy = answer["entropy"]
        assert entropy["touched"] > 0
        assert entropy["mean_after"] < entropy["mean_before"]
    (row,) = rows(folder / "rows.jsonl")
    assert row["method"] == "sharpen"
    assert row["entropy"]["mean_after"] < row["entropy"]["mean_before"]
    methods = {method["name"]: method for method in read(folder / "compared" / "results.json")["methods"]}
    assert "p^3 above 0.3 nats" in methods["sharpen:3"]["settings"]
    assert "p^3 above 0.3 nats" in said["emlocal chat --max-tokens 8"]


def check_method(folder: Path, said: dict[str, str]) -> None:
    answer = read(folder / "answer.json")
    assert len(answer["samples"]) == 3
    assert answer["score"] >= 0
    batch = rows(folder / "rows.jsonl")
    assert [row["method"] for row in batch] == ["surest", "surest"]
    for row in batch:
        means = [sample["entropy"]["mean_before"] for sample in row["samples"]]
        assert row["text"] == row["samples"][means.index(min(means))]["text"]
    methods = {method["name"]: method for method in read(folder / "compared" / "results.json")["methods"]}
    assert "surest of 2 by max entropy" in methods["surest:2:judge=max"]["settings"]
    assert "score" in said["emlocal chat --max-tokens 8"]


def check_engine(folder: Path, said: dict[str, str]) -> None:
    """Checks that it answers like torch, whose sums may be in bfloat16."""
    mine, torchs = (read(folder / f"{engine}.json") for engine in ("plain", "torch"))
    assert (mine["backend"], torchs["backend"]) == ("plain", "torch")
    assert mine["text"] == torchs["text"]
    assert abs(mine["entropy"]["mean_before"] - torchs["entropy"]["mean_before"]) < 0.1
    for row in rows(folder / "rows.jsonl"):
        assert row["entropy"]["mean_after"] < row["entropy"]["mean_before"]
    assert "plain" in said["emlocal doctor"]


def check_verb(folder: Path, said: dict[str, str]) -> None:
    assert "Show the tokens of a text." in said["emlocal --help"]
    assert "--backend" in said["emlocal tokens --help"]
    lines = (folder / "tokens.tsv").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[1] for line in lines] == ["'Hello'", "','", "' world'"]


CHECKS = {
    "An EM step": check_step,
    "A method": check_method,
    "An engine": check_engine,
    "A verb": check_verb,
}


def test_a_change_is_put_behind_its_line() -> None:
    assert changed("a\nb\n", [" a", "+x", "+y", " b", "+z"]) == "a\nx\ny\nb\nz\n"
    with pytest.raises(AssertionError, match="not there once"):
        changed("a\na\n", [" a", "+x"])
