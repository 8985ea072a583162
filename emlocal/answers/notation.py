"""One notation for answers written in LaTeX, in plain text or in Unicode, for `answers` to compare.

`\\frac{\\sqrt 3}{2}\\text{ cm}`, `√3/2` and `sqrt(3)/2` all become `sqrt(3)/2`; sets are written ⟦1, 2⟧, a
matrix `\\matrix(1&2;3&4)`. These are rewritings of text, each linear or bounded by the answer's length, which
the caller bounds; nothing is evaluated.
"""

import re

DEEPEST_GROUPS = 16  # braces within braces that are undone

_UNICODE = str.maketrans(
    dict(zip("−–×·°⁄€£", ["-", "-", "*", "*", "", "/", "", ""], strict=True))
    | {"π": r"\pi ", "∞": r"\infty ", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in "}
    | {"≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "²": "^2", "³": "^3"}
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^[*`]+|[*`]+$", ""),  # Markdown
        (r"\*\*", "^"),
        (r"(?<=[0-9])(?:\{,\}|,\\!|\\,) ?(?=[0-9]{3}(?![0-9]))", ""),  # 10,\!080
        (r"\\\\(?:\[[^\]]*\])?", ";"),  # the end of a matrix row
        (r"\\begin ?\{[bpB]?matrix\}", "\\\\matrix("),
        (r"\\end ?\{[bpB]?matrix\}", ")"),
        (r"\\?\$|\\?%|\\[()\[\]!]", ""),
        (r"\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mbox|text(?:rm|bf|it|normal)|math(?:rm|bf|it)|operatorname)(?![A-Za-z])", r"\\text"),
        (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z])", ""),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
        (r"\\le(?![A-Za-z])|<=", r"\\leq "),
        (r"\\ge(?![A-Za-z])|>=", r"\\geq "),
        (r"\\ne(?![A-Za-z])|!=", r"\\neq "),
        (r"√ ?([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"√|\\?sqrt ?(?=\()", "sqrt"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"\\\{", "⟦"),
        (r"\\\}", "⟧"),
        (r"\\text ?\{ ?(?:and|or),? ?\}", ","),
        (r"(?<=[0-9)}]),? (?:and|or) (?=[-0-9\\(A-Za-z])", ","),
    ]
]


def plain(text: str) -> str:
    """The answer without LaTeX's spacing, styles, units and braces: `\\frac{\\sqrt 3}{2}` is `sqrt(3)/2`."""
    longest = 2 * len(text) + 100
    text = text.translate(_UNICODE)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _without_words(_without_text(" ".join(text.split()).rstrip(". ")))
    for _ in range(DEEPEST_GROUPS):  # from the inside out
        before = text
        for group, rewrite in _GROUPS:
            text = group.sub(rewrite, text)
        if text == before or len(text) > longest:
            break
    return " ".join(text.split())


_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_LAST_TEXT = re.compile(r"(?<=[^ ]) ?((?:\\text ?\{[^{}]*\} ?(?:\^ ?\{?[0-9]\}?)? ?)+)$")
_LAST_WORDS = re.compile(
    r"(?: |(?=[ckm]?m\b|[km]?g\b|mph\b|ft\b|lbs?\b))"
    r"((?:[A-Za-z]{3,}|[ckm]m|kg|mg|ml|ft|in|lb|hr|oz|of|to|am|pm)"
    r"(?:[. -]+[A-Za-z]{2,}| ?/ ?[A-Za-z]+|\^[23])*\.?)$"
)
_NO_WORD = re.compile(r"^[A-Za-z] ?=|\\[A-Za-z]+")  # `x =` and LaTeX's commands
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MEANT = {"am", "pm", "mod", "base", "choose", "plus", "minus", "times", "sqrt", "sin", "cos", "tan", "log"}


def _without_text(text: str) -> str:
    """Drop a \\text{unit} at the end, unwrap all others."""
    if last := _LAST_TEXT.search(text):
        words = _TEXT.sub(r"\1", last[1])
        meant = _MEANT.union(_SCALES).intersection(re.findall("[a-z]+", words.lower()))
        text = text[: last.start()] + (" " + words.strip() if meant else "")
    return _TEXT.sub(r" \1 ", text)


def _without_words(text: str) -> str:
    """Drop words after a number, unless they count (`5 million`) or mean something (`5 pm`)."""
    last = _LAST_WORDS.search(text := " ".join(text.split()))
    head = text[: last.start()] if last else ""
    if last is None or not re.search(r"[0-9})]$", head) or re.search("[A-Za-z]", _NO_WORD.sub("", head)):
        return text
    words = re.findall("[a-z]+", last[1].lower())
    if words[0] in _SCALES:
        return f"{head}*10^{_SCALES[words[0]]}"
    return text if _MEANT.intersection(words) else head


_ATOM = r"\{[^{}]*\}|[0-9]|[A-Za-z]|\\[A-Za-z]+"
_SINGLE = re.compile(r"-?[0-9.]+|[A-Za-z]|\\[A-Za-z]+|sqrt\([^()]*\)")
_PRODUCT = re.compile(r"-?(?:[0-9A-Za-z.,\\*]|\^-?(?=\w)|sqrt\([^()]*\))+")


def _inside(group: str) -> str:
    return group.removeprefix("{").removesuffix("}").strip()


def _fraction(match: re.Match[str]) -> str:
    """a/b, with the parentheses that the braces stood for, and apart from what is multiplied with it."""
    over, under = _inside(match[1]), _inside(match[2])
    over = over if _PRODUCT.fullmatch(over) else f"({over})"
    under = under if _SINGLE.fullmatch(under) else f"({under})"
    before, after = match.string[: match.start()].rstrip(), match.string[match.end() :].lstrip()
    text = f"{over}/{under}"
    multiplied = re.match(r"[\w\\(^{]", after) and not re.match(r"\\(?:pm|cup|in|leq|geq|neq)\b", after)
    if multiplied or before.endswith(("^", "_", "/")):
        text = f"({text})"
    if before[-1:].isdigit() and re.fullmatch(r"[0-9]+/[0-9]+", text):
        return " " + text  # a mixed number
    glued = re.search(r"[\w)]$", before) and not re.search(r"\\[A-Za-z]+$", before)
    return ("*" if glued else "") + text


def _group(match: re.Match[str]) -> str:
    """Braces that are left: a single thing needs none, commas make a set, else they are parentheses."""
    inside = _inside(match[0])
    if not inside or _SINGLE.fullmatch(inside):
        return inside
    return f"⟦{inside}⟧" if "," in inside else f"({inside})"


_GROUPS = [
    (re.compile(rf"\\sqrt ?\[([^\[\]{{}}]*)\] ?({_ATOM})"), lambda m: f"root[{m[1]}]({_inside(m[2])})"),
    (re.compile(rf"\\sqrt ?({_ATOM})"), lambda m: f"sqrt({_inside(m[1])})"),
    (re.compile(rf"\\frac ?({_ATOM}) ?({_ATOM})"), _fraction),
    (re.compile(r"(?<=[\^_])[{(] ?(-?[0-9]+|[A-Za-z]) ?[)}](?! ?[0-9])"), lambda m: m[1]),
    (re.compile(r"(?<=[\^_])\{([^{}]*)\}"), lambda m: f"({m[1].strip()})"),
    (re.compile(r"(?<!frac)(?<!frac )(?<!sqrt)(?<!sqrt )(?<!\})(?<!\} )\{[^{}]*\}"), _group),
]
