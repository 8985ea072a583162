"""Programs in texts: the code in an answer, the requested function, and arguments for it.

The texts come from models and people, and nothing in them is run here. Values are only read by
`ast.literal_eval`, and only short ones.
"""

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from emlocal.answers.programs import PYTHON, parsed_code

_FENCED = re.compile(
    r"^[ \t]*(```|~~~)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE
)
_FUTURE = re.compile(r"^from __future__ import [^\n]*\n?", re.MULTILINE)
_DEFINED = re.compile(r"^(?:async[ \t]+)?def[ \t]+(\w+)", re.MULTILINE)
_GIVEN = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
LONGEST = 1000
"""Maximum number of characters of a call's arguments, or of an expected value, that is still read."""


def head_of(prompt: str) -> str:
    """Returns the prompt as a program: its imports and functions, which an answer may leave out."""
    started = [line for line in prompt.splitlines() if line.lstrip().startswith("def ")]
    indent = len(started[-1]) - len(started[-1].lstrip()) if started else 0
    program = f"{prompt.rstrip()}\n{' ' * (indent + 4)}pass\n" if started else prompt
    return "" if parsed_code(program) is None else program  # a description in words gives no program


def joined(*parts: str) -> str:
    """Joins several programs into one, with the imports from __future__ first, as Python requires."""
    program = "\n".join(parts)
    futures = "".join(line.rstrip("\n") + "\n" for line in _FUTURE.findall(program))
    return futures + _FUTURE.sub("", program)


@dataclass(frozen=True)
class Function:
    """A function that a prompt asks for."""

    name: str
    signature: str
    """Its definition: "def f(a, b=1)"; without parentheses if nothing more is known."""
    least: int = 0
    most: float = 0
    """Minimum and maximum number of positional arguments."""
    head: str = ""
    """The part of the prompt that runs before an answer."""

    def takes(self, arguments: int) -> bool:
        """Whether it can be called with this many arguments."""
        return self.least <= arguments <= self.most


def asked_for(prompt: str, answers: Sequence[str]) -> Function | None:
    """Returns the function that a prompt asks for, or None if no answer defines any.

    It is the last function that the prompt begins, or else the one that most answers define. If several are
    defined equally often, one that the prompt names wins, then the last one in the first answer.
    """
    given = [each for code in _blocks(prompt) for each in _given(code)]
    head = "\n".join(map(ast.unparse, given))
    begun = _begun(given)
    defined = [_names(answer) for answer in answers]
    counts = Counter(name for names in defined for name in dict.fromkeys(names))
    if begun is not None and begun in counts:
        return _function(begun, head, [head])
    if not counts:
        return None
    places = {name: place for names in reversed(defined) for place, name in enumerate(names)}
    name = max(
        counts, key=lambda name: (counts[name], bool(re.search(rf"\b{name}\b", prompt)), places[name], name)
    )
    return _function(name, head, [code for answer in answers for code in _blocks(answer)])


def _blocks(text: str) -> list[str]:
    """Returns the code of a text: its Python blocks, or all of it if it has no blocks."""
    blocks = list(_FENCED.finditer(text.replace("\r\n", "\n")))
    code = [textwrap.dedent(block[3]) for block in blocks if block[2].lower() in PYTHON]
    return code if blocks else [text]


def _names(answer: str) -> list[str]:
    """Returns the names of the top-level functions in an answer, in order."""
    return [match[1] for code in _blocks(answer) for match in _DEFINED.finditer(code)]


def _given(code: str) -> list[ast.stmt]:
    """Returns the imports, definitions and constants in a prompt's code.

    Other statements are left out, because they may call the requested function.
    """
    tree = parsed_code(code) or parsed_code(head_of(code))
    return [each for each in tree.body if isinstance(each, _GIVEN) or _is_constant(each)] if tree else []


def _is_constant(line: ast.stmt) -> bool:
    if not isinstance(line, ast.Assign):
        return False
    try:
        ast.literal_eval(line.value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def _begun(given: Sequence[ast.stmt]) -> str | None:
    """Returns the name of the last function, if its body is only a description."""
    functions = [each for each in given if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    if not functions:
        return None
    last = functions[-1]
    empty = all(
        isinstance(line, ast.Pass) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in last.body
    )
    return last.name if empty else None


def _function(name: str, head: str, codes: Sequence[str]) -> Function:
    """Returns the function as defined in the first of these programs that defines it."""
    for code in codes:
        tree = parsed_code(code)
        for each in tree.body if tree else ():
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and each.name == name:
                given = each.args
                positional = len(given.posonlyargs) + len(given.args)
                returns = f" -> {ast.unparse(each.returns)}" if each.returns else ""
                return Function(
                    name,
                    f"def {name}({ast.unparse(given)}){returns}",
                    positional - len(given.defaults),
                    float("inf") if given.vararg else positional,
                    head,
                )
    return Function(name, f"def {name}", 0, float("inf"), head)


@dataclass(frozen=True)
class Example:
    """A call, with its expected value if known."""

    arguments: tuple[object, ...]
    expected: tuple[object] | None = None
    """The value in a tuple, since it may be None."""


def printed(prompt: str, name: str) -> list[Example]:
    """Returns a function's examples in a prompt.

    `>>> f(1)` with its result, f(1) == 2, f(1) ➞ 2, "f(1) returns 2".

    Each call counts once, and its arguments must be literals. An uncertain result is left out.
    """
    found: dict[str, Example] = {}
    for match in re.finditer(rf"(?<![\w.]){re.escape(name)}[ ]?(?=\()", prompt):
        before = prompt[prompt.rfind("\n", 0, match.start()) + 1 : match.start()]
        end = _closing(prompt, match.end())
        if end is None or before.rstrip().endswith("def"):
            continue
        arguments = _arguments(prompt[match.end() : end])
        if arguments is None:
            continue
        said = None if "\\" in prompt[match.end() : end] else _said(before, prompt[end:])
        example = Example(arguments, said)
        known = found.setdefault(repr(arguments), example)
        if known.expected is None:
            found[repr(arguments)] = example
    return list(found.values())


def written(text: str, function: Function, most: int) -> list[tuple[object, ...]]:
    """Returns the arguments that a model wrote, each once, at most `most`.

    A line has one tuple, one call of the function, or a list of tuples. Other lines are skipped.
    """
    found: dict[str, tuple[object, ...]] = {}
    for line in text.splitlines():
        for arguments in _line(line, function):
            found.setdefault(repr(arguments), arguments)
    return list(found.values())[:most]


def _line(line: str, function: Function) -> list[tuple[object, ...]]:
    line = re.sub(r"^(?:(?:[-*•>]|\(?\d+[.):])\s+)?`*\s*", "", line.strip()).rstrip(" `,;")
    call = re.match(rf"(?:\w+\s*=\s*|print\(|assert\s+)?{re.escape(function.name)}\s*(?=\()", line)
    if call:
        end = _closing(line, call.end())
        found = _arguments(line[call.end() : end]) if end else None
    elif line[:1] == "(":
        end = _closing(line, 0)
        alone = end and re.match(r"\s*,?\s*(?:#|$|[-=]+>|➞|→)", line[end:])
        found = _arguments(line[:end]) if alone else None
    else:
        value = _literal(re.sub(r"^\w+\s*=\s*", "", line.partition(" #")[0]))
        listed = value[0] if value is not None else None
        if isinstance(listed, list) and listed and all(isinstance(each, tuple) for each in listed):
            return [each for each in listed if function.takes(len(each))]
        found = value
    if found is None or function.takes(len(found)):
        return [] if found is None else [found]
    # a single argument that is itself a tuple
    return [(found,)] if not call and found and function.takes(1) else []


def _arguments(source: str) -> tuple[object, ...] | None:
    """Returns the arguments in these parentheses, or None unless all are literals."""
    call = _expression(f"f{source}")
    if not isinstance(call, ast.Call) or call.keywords:
        return None
    return _value(ast.Tuple(call.args))


def _literal(text: str) -> tuple[object] | None:
    """Returns the value in a tuple, or None. Accepts true and null as in JSON."""
    text = {"true": "True", "false": "False", "null": "None", "none": "None"}.get(text, text).strip()
    found = _expression(text) if text else None
    value = None if found is None else _value(ast.Tuple([found]))
    return None if value is None else (value[0],)


def _value(node: ast.Tuple) -> tuple[object, ...] | None:
    """Returns the values, or None if they are not literals or cannot be written so (1e999 is infinite)."""
    try:
        found: tuple[object, ...] = ast.literal_eval(repr(ast.literal_eval(node)))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return found


def _expression(source: str) -> ast.expr | None:
    if len(source) > LONGEST:
        return None
    module = parsed_code(source)
    line = module.body[0] if module and len(module.body) == 1 else None
    return line.value if isinstance(line, ast.Expr) else None


_OPENING, _CLOSING = "([{", ")]}"


def _closing(text: str, start: int) -> int | None:
    """Returns the place after the bracket that closes the one at `start`.

    Returns None if there is none within reach.
    """
    depth, quote, at = 0, "", start
    while at < min(len(text), start + LONGEST + 2):
        char = text[at]
        if quote:
            if char == "\\":
                at += 1
            elif char == quote or char == "\n":
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in _OPENING:
            depth += 1
        elif char in _CLOSING:
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return None


_SAYS = re.compile(
    r"\s*(?:(?:#|//)\s*)?(?:[-=]*[-=]>|==?|➞|→|⇒|⟹|(?:returns?|gives|is|evaluates to|"
    r"should (?:return|be|equal|give))\b):?[ \t]*"
)
_COMMENT = re.compile(r"\s*(?:#|//)[ \t]*")
_GOES_ON = re.compile(r"[\w\"'\[({]|\s*(?:[-+*/%|&^<>=]|(?:or|if|else|in|not|is)\b|,\s*[-+\d\"'\[({]|\.\d)")


def _said(before: str, after: str) -> tuple[object] | None:
    """Returns a call's expected value from the text before it on its line and the text after it."""
    line, _, below = after.partition("\n")
    prompted = before.strip() == ">>>"
    if before.rstrip().endswith("print(") and line.startswith(")"):
        line = line[1:]
    below = re.split(r"^[ \t]*(?:>>>|$)|\"\"\"|'''|```", below, maxsplit=1, flags=re.MULTILINE)[0].strip()
    if prompted and not re.sub(r"#.*", "", line).strip():
        return _first_literal(below) if len(below) <= LONGEST else None
    arrow = _SAYS.match(line) or _COMMENT.match(line)
    if arrow is None or (prompted and below == "False"):
        return None
    return _first_literal(line[arrow.end() :])


def _first_literal(text: str) -> tuple[object] | None:
    """Returns the literal at the start of a text, unless the expression continues after it."""
    if text[:1] in _OPENING:
        end = _closing(text, 0) if text else None
    elif text[:1] in ('"', "'"):
        end = next((i + 1 for i in range(1, len(text)) if text[i] == text[0] and text[i - 1] != "\\"), None)
    else:
        word = re.match(r"[-+]?(?:[\d.]+[eE][-+]?\d+|[\w.]+)", text)
        end = word.end() - word[0].endswith(".") if word else None
    if end is None or "\\" in text[:end] or _GOES_ON.match(text[end:]):
        return None
    found = _literal(text[:end])
    in_parentheses = text[:1] == "(" and found is not None and not isinstance(found[0], tuple)
    return None if in_parentheses else found  # in ("a") some writers meant a tuple
