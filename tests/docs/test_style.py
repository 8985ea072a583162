"""Help texts, messages and what is said are written as docs/style.md has it.

The texts are read from the source (tests/docs/texts.py); a second, simpler reading checks them.
"""

import ast
import re
from functools import cache
from typing import Any

import pytest
import typer.main

from emlocal.cli.app import EXAMPLES, GROUPS, VERBS, build
from tests.docs.texts import ROOT, Text, rendered, texts

MOST_WORDS = 30
NOT_OURS = (
    "emlocal/answers/notation.py",  # symbols of mathematics
    "emlocal/evaluation/tasks/",  # what models are asked, which must stay as it was measured
    "emlocal/measure.py",
    "emlocal/methods/behaviour_vote.py:",
    "emlocal/methods/programs.py",
    "emlocal/sandbox/seccomp.py",  # a table of reasons, which nobody is shown
    "emlocal/models/gguf/keys.py:",  # names of architectures
)
"""Places whose texts of no certain kind are not for people to read."""

PATTERNS = {
    r"(^|[.:;] )Of [a-z]": "a fragment that begins with Of",
    r"cannot be meant": "say what is valid",
    r"(?<!there )\b(is|are) no\b": "is not a …",
    r"\bnone of (its|the|them)\b": "name the thing",
    r"what comes of": "name the outcome",
    r"where there is none|where there are none": "if … is missing",
    r"\bis said\b|\bare said\b": "say who reports it",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again",
    r"\bbesides[.:]?$": "also",
    r"\bgo(es|ing)? on (with|where|from|after)\b": "continue, resume",
    r"\bgoes on\b": "continue, resume",
    r"\bholds for\b": "applies to",
    r"\bplease\b|!( |$)": "no please, no exclamation marks",
    r"\binvalid (value|option|setting)\b": "say what is valid",
}
"""docs/style.md, "Patterns to avoid", and what to write instead."""

AMERICAN = re.compile(
    r"\b((behavior|color|favor|flavor|honor|labor|neighbor|rumor)(s|ed|ing|able|ite|less|al)?"
    r"|(center|fiber|meter|theater)(s|ed)?"
    r"|(analyz|catalyz|paralyz)(e|es|ed|ing)"
    r"|(categor|character|emphas|familiar|final|formal|general|harmon|initial|local|maxim|memor|minim|modern"
    r"|normal|optim|organ|penal|quant|random|real|recogn|regular|serial|special|standard|summar|symbol"
    r"|synchron|util|vector|visual)(ize|izes|ized|izing|ization|izations|izer|izers)"
    r"|(cancel|label|model|signal|total|travel)(ed|ing)"
    r"|catalog|defense|fulfill|gray|judgment|license|offense|skeptical)\b",
    re.IGNORECASE,
)
TERMS = re.compile(r"entropy minimization|--[\w-]+|\w+=|tokenizer|outside upper center", re.IGNORECASE)
"""Names that keep their spelling: the method's, flags, and what a file is called."""
DOUBLED = re.compile(r"^(cancelled|labelled|modelled|signalled|totalled|travelled)", re.IGNORECASE)

PROJECT = {"EmlocalError", "UsageError", "ModelError", "BackendError", "ContextFullError"}
WITHOUT_FIX = 113
"""Errors that have no fix and do not name the valid values, mostly since the system's reason tells it. New
errors have a fix."""


@cache
def ours() -> tuple[Text, ...]:
    """All texts that people read."""
    return tuple(t for t in texts() if t.kind != "other" or not t.place.startswith(NOT_OURS))


def sentences(text: Text) -> list[str]:
    """The sentences of a text, each placeholder a word."""
    parts = re.split(r"\n\s*\n" if text.kind == "help" else r"\n", text.words)
    return [sentence for part in parts for sentence in re.split(r"(?<=[.!?;])\s+", " ".join(part.split()))]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_text_has_a_pattern_to_avoid(pattern: str) -> None:
    found = [f"{t.place}: {t.text!r}" for t in ours() if re.search(pattern, t.words)]
    assert not found, f"{PATTERNS[pattern]}: {found}"


def test_the_spelling_is_british() -> None:
    found = [
        f"{t.place}: {match[0]} in {t.text!r}"
        for t in ours()
        for match in AMERICAN.finditer(TERMS.sub(" ", t.words))
        if not DOUBLED.match(match[0])
    ]
    assert not found, found


def test_the_word_list_knows_american_spellings() -> None:
    for word in ("color", "behavior", "center", "normalized", "optimizer", "license", "labeled", "canceled"):
        assert AMERICAN.search(f"the {word} of it"), word
    for word in ("colour", "behaviour", "centre", "normalised", "optimiser", "licence", "size", "rise"):
        assert not AMERICAN.search(f"the {word} of it"), word


def test_no_sentence_is_too_long() -> None:
    found = [
        f"{t.place}: {len(s.split())} words: {s!r}"
        for t in ours()
        for s in sentences(t)
        if len(s.split()) > MOST_WORDS
    ]
    assert not found, found


def test_help_texts_are_sentences() -> None:
    for text in (t for t in ours() if t.kind == "help"):
        said = text.words.strip()
        whole = said.endswith((".", ")")) or said.startswith("X") or not said[:1].isupper()
        assert whole, f"{text.place}: {said!r} does not end with a full stop"


def test_errors_and_fixes_keep_the_form_of_errors() -> None:
    for text in (t for t in ours() if t.kind in ("error", "fix")):
        assert not text.text.endswith("."), f"{text.place}: {text.text!r} ends with a full stop"
        assert "\n" not in text.text, f"{text.place}: {text.text!r} is more than a line"


def test_errors_have_a_fix() -> None:
    raised, without = 0, []
    for path in sorted((ROOT / "emlocal").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id in PROJECT:
                raised += 1
                assert node.args, f"{path.name}:{node.lineno}: an error without a message"
                hints = [k for k in node.keywords if k.arg == "hint"]
                says = "; ".join(rendered(node.args[0])) if node.args else ""
                tells = any(words in says for words in ("must be", "must have", "it takes", "is supported"))
                if len(node.args) < 2 and not hints and not tells:
                    without.append(f"{path.name}:{node.lineno} {rendered(node.args[0])}")
    assert raised > 400
    assert len(without) <= WITHOUT_FIX, f"{len(without)} errors have no fix: {without}"


# ------------------------------------------------------------------- that all of them were read


def test_every_help_text_of_the_program_was_read() -> None:
    found = [re.escape(" ".join(t.text.split())) for t in texts()]
    # what is filled in may be anything
    patterns = [re.compile(re.sub(r"\\\{.*?\\\}", ".*", each)) for each in found]
    helps = {" ".join(text.split("\f")[0].split()) for text in _helps()}
    assert len(helps) > 150
    for text in helps:
        plain = re.sub(r" \(default: .*\)$", "", text)
        assert any(p.fullmatch(plain) or p.fullmatch(text) for p in patterns), f"not read: {text!r}"


def _helps() -> list[str]:
    found: list[str] = []
    for verb in VERBS:
        root: Any = typer.main.get_command(build([verb]))
        command = root.commands[verb]
        for each in [command, *getattr(command, "commands", {}).values()]:
            found.append(each.help or "")
            found += [p.help for p in each.params if getattr(p, "help", None) and p.name != "help"]
    return [text for text in found if text]


def test_every_literal_message_was_read() -> None:
    """By a regular expression: an error whose message begins on the line of its name, or the next."""
    begins = re.compile(r'\b(?:Usage|Model|Backend|ContextFull|Emlocal)Error\(\s*f?"([^"{\\]{8,})')
    read = [t.text for t in texts()]
    count = 0
    for path in (ROOT / "emlocal").rglob("*.py"):
        for beginning in begins.findall(path.read_text(encoding="utf-8")):
            count += 1
            assert any(text.startswith(beginning) for text in read), (
                f"{path.name}: {beginning!r} was not read"
            )
    assert count > 120


def test_there_are_as_many_texts_as_there_were() -> None:
    kinds = [t.kind for t in texts()]
    assert kinds.count("help") >= 150
    assert kinds.count("error") >= 480
    assert kinds.count("fix") >= 240
    assert kinds.count("said") >= 75


# ------------------------------------------------------------------- examples


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_can_be_parsed(name: str) -> None:
    import shlex

    for example in EXAMPLES[name]:
        program, *words = shlex.split(example)
        assert program == "emlocal"
        assert example.startswith(f"emlocal {name}")
        assert len(example) <= 84
        command: Any = typer.main.get_command(build(words))
        while getattr(command, "commands", None):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(name, words)  # parses; runs nothing


def test_every_verb_has_examples() -> None:
    verbs = set(VERBS)
    for group in GROUPS:
        root: Any = typer.main.get_command(build([group]))
        verbs |= {f"{group} {name}" for name in root.commands[group].commands}
    assert set(EXAMPLES) == verbs
