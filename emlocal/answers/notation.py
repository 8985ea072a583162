"""One notation for answers written in LaTeX, in plain text or in Unicode, so that `meaning` can compare them.

`\\frac{\\sqrt 3}{2}\\text{ cm}`, `√3/2` and `sqrt(3)/2` all become `sqrt(3)/2`. Sets are written ⟦1, 2⟧, a
matrix `\\matrix(1&2;3&4)`. These are rewritings of text, each linear or bounded by the answer's length, which
the caller bounds; nothing is evaluated.
"""

import re
from unicodedata import normalize

DEEPEST_GROUPS = 16  # braces within braces that are removed

_NAMES = """
    α alpha β beta γ gamma δ delta ε epsilon ζ zeta η eta θ theta ι iota κ kappa λ lambda μ mu µ mu ν nu ξ xi
    π pi ρ rho σ sigma τ tau φ phi ϕ phi χ chi ψ psi ω omega Γ Gamma Δ Delta Θ Theta Λ Lambda Ξ Xi Π Pi
    Σ Sigma Φ Phi Ψ Psi Ω Omega ∞ infty ± pm ∪ cup ∩ cap ∈ in ≤ leq ≥ geq ≠ neq ≈ approx ∅ emptyset
    × times · cdot ⋅ cdot ∙ cdot ∗ cdot
"""
_UNICODE = str.maketrans(
    {char: rf"\{name} " for char, name in re.findall(r"(\S) (\w+)", _NAMES)}
    | {"−": "-", "–": "-", "÷": "/", "⁄": "/", "°": r"^\circ ", "ℝ": r"\mathbb{R}"}
    | {"\N{NO-BREAK SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " "}
)
_DEGREE = r"(?:\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z]))"
_SYMBOLS = re.compile(
    "([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+)|([₀₁₂₃₄₅₆₇₈₉]+)|([½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])"
    r"|(?:√|(?<![A-Za-z\\])sqrt) ?\(([^()]*)\)|√ ?([0-9]+|[A-Za-z]|\\[a-z]+)|√"
)


def _compiled(*rewrites: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rewrites]


_TIDY = _compiled(  # LaTeX stays LaTeX
    (r"^[*`]+|[*`]+$", ""),  # Markdown
    (r"(?<=[0-9])(?:\{,\}|,\\!|\\,) ?(?=[0-9]{3}(?![0-9]))", ""),  # 10,\!080
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\(?:displaystyle|bf|rm|it|tt|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"\\(?:text|page)?color(?:box)? ?\{[^{}]*\}", ""),
    (r"\\(?:mbox|text(?:rm|bf|it|sf|tt|normal)|math(?:rm|bf|it|sf|tt)|operatorname)(?![A-Za-z])", r"\\text"),
    (r"[€£¥￥₹₩₽¢]|\\(?:pounds|euro|yen)(?![A-Za-z])", ""),
    (r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)", r"\\times "),
    (r"(?<=[0-9]) ?(?:\\text ?\{ ?per ?cent ?\}|per ?cent(?![A-Za-z]))", r"\\%"),
    (rf"({_DEGREE}) ?(?:\\text ?\{{ ?[CFK] ?\}}|[CFK](?![A-Za-z]))", r"\1"),
)
_UNDO = _compiled(
    (r"\*\*", "^"),
    (r"\\\\(?:\[[^\]]*\])?", ";"),  # the end of a matrix row
    (r"\\begin ?\{[bpB]?matrix\}", "\\\\matrix("),
    (r"\\end ?\{[bpB]?matrix\}", ")"),
    (r"\\?\$|\\?%|\\[()\[\]!]", ""),
    (r"\\(?:left|right)(?![A-Za-z])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (_DEGREE, ""),
    (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\\le(?![A-Za-z])|<=", r"\\leq "),
    (r"\\ge(?![A-Za-z])|>=", r"\\geq "),
    (r"\\ne(?![A-Za-z])|!=|\\not ?=", r"\\neq "),
    (r"\\approx(?![A-Za-z])", "="),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"(\\[A-Za-z]+)(?=\\sqrt)", r"\1 "),
    (r"\\?sqrt ?(?=\()", "sqrt"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (r"\\\{", "⟦"),
    (r"\\\}", "⟧"),
    (r"\\text ?\{ ?(?:and|or),? ?\}", ","),
    (r"(?<=[0-9)}]),? (?:and|or) (?=[-0-9\\(A-Za-z])", ","),
)


def latex(text: str) -> str:
    """Returns the answer with LaTeX's names for Unicode's symbols, without colours, currency and units.

    `5√2 m` is `5\\sqrt{2}`, `x²` is `x^{2}`.
    """
    text = _SYMBOLS.sub(_symbol, text).translate(_UNICODE)
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return without_unit(_without_text(" ".join(text.split())))


def _symbol(match: re.Match[str]) -> str:
    raised, lowered, vulgar, inside, root = match.groups()
    if raised:
        return f"^{{{normalize('NFKC', raised)}}}"
    if lowered:
        return f"_{{{normalize('NFKC', lowered)}}}"
    if vulgar:
        over, _, under = normalize("NFKC", vulgar).partition("\N{FRACTION SLASH}")
        return rf"\frac{{{over}}}{{{under}}}"
    if inside or root:
        return rf"\sqrt{{{inside or root}}}"
    return match[0].replace("√", r"\sqrt")


def plain(text: str) -> str:
    """Returns the answer without LaTeX's spacing, styles, units and braces.

    `\\frac{\\sqrt 3}{2}` is `sqrt(3)/2`.
    """
    longest = 2 * len(text) + 100
    text = latex(text)
    for pattern, replacement in _UNDO:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split()).rstrip(".,; ").removeprefix("=").lstrip()
    if _SPACED.fullmatch(text):
        return text.replace(" ", "")
    text = _REPEATING.sub(_repeated, without_unit(_TEXT.sub(r" \1 ", _without_text(text))))
    for _ in range(DEEPEST_GROUPS):  # from the inside out
        before = text
        for group, rewrite in _GROUPS:
            text = group.sub(rewrite, text)
        if text == before or len(text) > longest:
            break
    return " ".join(text.split())


# --------------------------------------------------------------------------------------------------- units

_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_LAST_TEXT = re.compile(r"(?<=[^ ,;=(\[⟦]) ?((?:\\text ?\{[^{}]*\} ?(?:\^ ?\{?-?[0-9]\}?)? ?)+)(?=[$.]*$)")
_LAST_WORDS = re.compile(
    r"(?: |(?=[ckm]?m\b|[km]?g\b|mph\b|ft\b|lbs?\b))"
    r"((?:[A-Za-z]{3,}|[ckm]m|kg|mg|ml|ft|in|lb|hr|oz|sq|cu|of|to|am|pm)"
    r"(?:[. -]+[A-Za-z]{2,}| ?/ ?[A-Za-z]+|\^[23])*\.?)(?=[$.]*$)"
)
_LONG_UNIT = (  # units that cannot be a product of letters
    r"(?:(?:\\mu |[pnmcdhkMGT])(?:[mgsLlJNWVACFKB]|Pa|Hz|eV|cal|mol|bar|Wh|Ah)"
    r"|Pa|Hz|eV|mol|cal|bar|atm|Wh|Ah|Nm|min|hrs?|sec|mi|yd|ft|in|lbs?|oz|pt|qt|gal|ha|mph|kph|rpm|psi)(?![A-Za-z])"
)
_ANY_UNIT = rf"(?:{_LONG_UNIT}|[mgshLlJNWVAKCF](?![A-Za-z]))"
_RAISED = r"(?: ?\^ ?(?:\{ ?-?[0-9] ?\}|\(-?[0-9]\)|-?[0-9]))?"
_UNIT = _ANY_UNIT + _RAISED
_PER = (
    rf"(?: ?/ ?| per )(?:\( ?{_UNIT}(?: ?(?:\\cdot|\*)? ?{_UNIT})? ?\)"
    rf"|{_UNIT}|[A-Za-z]{{3,}}{_RAISED})"
)
_BY = rf"(?: ?(?:\\cdot|\\times|\*) ?{_UNIT}| {_ANY_UNIT} ?\^ ?[{{(]? ?-[0-9] ?[)}}]?)"
_RATE = (
    "sec|second|min|minute|hr|hour|day|week|month|year|person|unit|item|piece|kg|lb|pound|oz|ounce|gallon|mi"
    "|mile|km"
)
_LAST_UNIT = re.compile(
    rf"(?: (?:{_LONG_UNIT}{_RAISED}(?: {_UNIT}|{_PER}|{_BY}){{0,4}}|{_UNIT}(?:{_PER}|{_BY}){{0,4}})"
    rf"|(?:mL|[kKMGT]B|[kMG]?Hz|[kM]J|[kM]Wh?|k?Pa|[kM]?eV)| ?/ ?(?:{_RATE})s?)(?=[$.]*$)"
)
_NUMBER_END = re.compile(r"[0-9})]\$?$")
_LETTER = re.compile("[A-Za-z]")
_NO_WORD = re.compile(r"^[A-Za-z] ?=|\\[A-Za-z]+")  # `x =` and LaTeX's commands
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MEANT = {"am", "pm", "mod", "base", "choose", "plus", "minus", "times", "sqrt", "sin", "cos", "tan", "log"}


def _without_text(text: str) -> str:
    """Drops a \\text{unit} at the end; a text with a meaning of its own loses its braces only."""
    if last := _LAST_TEXT.search(text):
        words = _TEXT.sub(r"\1", last[1])
        meant = _MEANT.union(_SCALES).intersection(re.findall("[a-z]+", words.lower()))
        head = text[: last.start()]
        if _TEXT.search(head) and head[-1].isdigit():
            return text  # 5 \text{ hours } 30 \text{ minutes}
        text = (head + " " + words.strip() if meant else head.rstrip("/ ")) + text[last.end() :]
    return text


def without_unit(text: str) -> str:
    """Drops words and units after a number, unless they count (`5 million`) or mean something (`5 pm`)."""
    text = " ".join(text.split())
    for pattern in (_LAST_UNIT, _LAST_WORDS):
        last = pattern.search(text)
        head = text[: last.start()] if last else ""
        if last is None or not _NUMBER_END.search(head) or _LETTER.search(_NO_WORD.sub("", head)):
            continue
        words = re.findall("[a-z]+", last[0].lower())
        if words[0] in _SCALES:
            return f"{head}*10^{_SCALES[words[0]]}{text[last.end() :]}"
        return text if _MEANT.intersection(words) else head + text[last.end() :]
    return text


# -------------------------------------------------------------------------------------------------- braces

_SPACED = re.compile(r"[-+]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?")  # 1 000
_REPEATING = re.compile(
    r"(?<![0-9.,])([0-9]{0,30})\.([0-9]{0,30})\\(?:overline|bar|dot) ?(?:\{([0-9]{1,30})\}|([0-9]))"
)


def _repeated(match: re.Match[str]) -> str:
    """Returns 4.\\overline{6} as 14/3."""
    whole, once, again = match[1] or "0", match[2], match[3] or match[4]
    over = int(whole + once + again) - int(whole + once)
    return f"{over}/{'9' * len(again)}{'0' * len(once)}"


_ATOM = r"\{[^{}]*\}|[0-9]|[A-Za-z]|\\[A-Za-z]+"
_SINGLE = re.compile(r"-?[0-9.]+|[A-Za-z]|\\[A-Za-z]+|sqrt\([^()]*\)")
_PRODUCT = re.compile(r"-?(?:[0-9A-Za-z.,\\*]|\^-?(?=\w)|sqrt\([^()]*\))+")


def _inside(group: str) -> str:
    return group.removeprefix("{").removesuffix("}").strip()


def _fraction(match: re.Match[str]) -> str:
    """Returns a/b, with parentheses for the braces if needed, separated from its factors."""
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
    """Removes remaining braces: a single thing needs none, commas make a set, else they are parentheses."""
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
