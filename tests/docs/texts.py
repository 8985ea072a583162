"""Every text of emlocal that a person sees, read from its source: help texts, errors and what is said.

python -m tests.docs.texts [FOLDER]           lists them, with their placeholders
python -m tests.docs.texts --compare OLD NEW  says which numbers, placeholders and fixes NEW has lost

A text stands here as it is written, its placeholders as `{expression}`.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
Kind = Literal["help", "error", "fix", "said", "other"]

SPEAKERS = ("note", "warn", "heading", "progress", "working", "loading", "say", "print")
"""Functions whose first text a person reads."""
_PLAIN = (
    "ValueError",
    "TypeError",
    "RuntimeError",
    "KeyError",
    "OSError",
    "AttributeError",
    "AssertionError",
)
_SETTINGS = ("setting", "_setting", "_engine_setting")
_PLACEHOLDER = re.compile(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}")
_NUMBER = re.compile(r"(?<![\w.])\d[\d,.]*\d|(?<![\w.])\d")


@dataclass(frozen=True)
class Text:
    """One text, where it stands, and what it is."""

    kind: Kind
    place: str
    """File and the function or class around it."""
    line: int
    text: str
    error: str = ""
    """The class of the error; of a fix too."""

    @property
    def placeholders(self) -> Counter[str]:
        """The expressions that are filled in, without their formats."""
        found = (each.strip("{}").split("!")[0] for each in _PLACEHOLDER.findall(self.text))
        return Counter(each for each in found if each)

    @property
    def numbers(self) -> Counter[str]:
        """The numbers that stand in it."""
        return Counter(_NUMBER.findall(self.words))

    @property
    def words(self) -> str:
        """The text, a placeholder as one letter."""
        return _PLACEHOLDER.sub("X", self.text)


def rendered(node: ast.expr | None) -> list[str]:
    """The texts that an expression can give: one, or one of each branch of a condition."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = []
        for value in node.values:
            if isinstance(value, ast.Constant):
                parts.append(str(value.value))
            else:
                assert isinstance(value, ast.FormattedValue)
                parts.append("{" + ast.unparse(value.value) + "}")
        return ["".join(parts)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in rendered(node.left) or ["{}"] for b in rendered(node.right) or ["{}"]]
    if isinstance(node, ast.IfExp):
        return rendered(node.body) + rendered(node.orelse)
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in rendered(value)]
    return ["{" + ast.unparse(node) + "}"] if node is not None else []


def texts(root: Path = ROOT / "emlocal") -> list[Text]:
    """All texts of a package, in the order of its files."""
    return [each for path in sorted(root.rglob("*.py")) for each in texts_of(path, root.parent)]


def texts_of(path: Path, root: Path = ROOT) -> list[Text]:
    """The texts of one file."""
    found = _Finder(str(path.relative_to(root)))
    found.visit(ast.parse(path.read_text(encoding="utf-8")))
    return found.texts


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str) -> None:
        self.file = file
        self.around: list[str] = []
        self.texts: list[Text] = []
        self._taken: set[int] = set()

    def _add(self, kind: Kind, node: ast.expr, error: str = "") -> None:
        for text in rendered(node):
            if _PLACEHOLDER.sub("", text).strip():
                place = f"{self.file}:{'.'.join(self.around)}"
                self.texts.append(Text(kind, place, node.lineno, text, error))
        self._taken |= {id(each) for each in ast.walk(node) if isinstance(each, ast.Constant | ast.JoinedStr)}

    def _inside(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        self.around.append(node.name)
        self._docstring(node)
        self.generic_visit(node)
        self.around.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._inside(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._inside(node)

    def visit_Module(self, node: ast.Module) -> None:
        self._docstring(node)
        self.generic_visit(node)

    def _docstring(self, node: ast.ClassDef | ast.FunctionDef | ast.Module) -> None:
        if ast.get_docstring(node) is None:
            return
        first = node.body[0]
        assert isinstance(first, ast.Expr)
        if (
            self.file.startswith("emlocal/cli/")
            and isinstance(node, ast.FunctionDef)
            and _is_verb(node, self.file)
        ):
            self._add("help", first.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):  # a docstring, or one after a field
            return
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _name(node.func)
        keywords = {each.arg: each.value for each in node.keywords if each.arg}
        for keyword in ("help", "label", "fix"):
            if keyword in keywords:
                self._add("help" if keyword == "help" else "other", keywords[keyword])
        if name in _SETTINGS and len(node.args) > 4:
            self._add("help", node.args[4])
        if name.endswith("Error") and node.args and name not in _PLAIN:
            self._add("error", node.args[0], name)
            for fix in node.args[1:] + [v for k, v in keywords.items() if k == "hint"]:
                self._add("fix", fix, name)
        elif name in _PLAIN and node.args:
            self._add("error", node.args[0], name)
        elif name in SPEAKERS and node.args:
            self._add("said", node.args[0])
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        if id(node) not in self._taken and _is_prose(rendered(node)[0]):
            self._add("other", node)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and id(node) not in self._taken and _is_prose(node.value):
            self._add("other", node)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_prose(text: str) -> bool:
    words = _PLACEHOLDER.sub(" X ", text)
    return len(re.findall(r"(?<![\w.\\<-])[A-Za-z][a-z]+(?=[\s,.:;)]|$)", words)) >= 3


def _is_verb(node: ast.FunctionDef, file: str) -> bool:
    """Whether the docstring is the help text of a verb."""
    commands = any("command" in ast.unparse(each) for each in node.decorator_list)
    return commands or node.name in (Path(file).stem, "_root")


def listing(found: list[Text]) -> list[str]:
    """One line a text."""
    return [f"{t.place}\t{t.kind}\t{t.error}\t{t.text!r}" for t in found]


def compare(old: Path, new: Path) -> list[str]:
    """What the texts of each place in `new` lack of those in `old`: numbers, placeholders, errors"
    " and fixes."""

    def sums(root: Path) -> dict[str, dict[str, Counter[str]]]:
        places: dict[str, dict[str, Counter[str]]] = {}
        for each in texts(root):
            place = places.setdefault(each.place, {n: Counter() for n in ("placeholder", "number", "kind")})
            place["placeholder"] += each.placeholders
            place["number"] += each.numbers
            place["kind"] += Counter([f"{each.kind} {each.error}".strip()])
        return places

    before, after = sums(old), sums(new)
    lost = []
    for place, had in before.items():
        has = after.get(place)
        if has is None:
            lost.append(f"{place}: no text any more ({dict(had['kind'])})")
            continue
        for what in had:
            if missing := had[what] - has[what]:
                lost.append(f"{place}: {what} {dict(missing)}")
    return lost


def _lines() -> Iterator[str]:
    if sys.argv[1:2] == ["--compare"]:
        yield from compare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        yield from listing(texts(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "emlocal"))


if __name__ == "__main__":
    print("\n".join(_lines()))
