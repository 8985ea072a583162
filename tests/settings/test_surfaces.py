"""One setting in all places where it can be set: the same value, error and names."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from emlocal.api import Model, Settings
from emlocal.backends.fake import FakeBackend, hashed
from emlocal.batch.lines import BadLine, Item, parse_line
from emlocal.cli.options import ALIASES, Verb, respelt, with_options
from emlocal.em.steps import AdaptiveTemperature, EMInf
from emlocal.errors import UsageError
from emlocal.evaluation.contenders import read_contenders
from emlocal.settings import EM_STEPS, Given, Setting, Table, resolve_settings, setting
from emlocal.settings.em import EM, em_table
from emlocal.settings.resolve import CONSTRAINT, GENERATION, LINE, SAMPLING, read_settings
from emlocal.settings.table import FLAGS, KEYS, NAMES, NOTHING, SET
from tests.cli.conftest import Outcome, emlocal, tiny
from tests.examples import examples

__all__ = ["emlocal", "tiny"]
KNOWN = list(GENERATION.settings.values())
OBJECTS = ("json_schema", "chat_template_kwargs")
"""Settings that take an object as well as its JSON."""
NUMBERS = [known for known in KNOWN if known.kind in ("number", "whole")]


def typed_as_flags(*arguments: str) -> Given:
    """Returns the values that a verb receives for these arguments."""
    handed = []

    @with_options
    def probe(given: Annotated[Given, EM, SAMPLING, CONSTRAINT] = NOTHING) -> None:
        handed.append(given)

    app = typer.Typer(add_completion=False)
    app.command("probe", cls=Verb)(probe)
    app(list(arguments), standalone_mode=False)
    return handed[0]


def as_flag(known: Setting, value: Any, name: str | None = None) -> Given:
    flag = name or known.flag
    if known.kind == "switch":
        return typed_as_flags(flag if value else known.off)
    texts = value if isinstance(value, list) else [value]
    return typed_as_flags(*(argument for text in texts for argument in (flag, str(text))))


def in_file(path: Path, known: Setting, value: Any, name: str | None = None) -> Given:
    key = (name or known.flag).removeprefix("--")
    path.write_text(f"{key} = {json.dumps(value)}", encoding="utf-8")  # such values are TOML too
    return read_settings(path, GENERATION)


def by_set(known: Setting, value: Any, name: str | None = None) -> Given:
    text = value if isinstance(value, str) else json.dumps(value)
    return GENERATION.read_text((name or known.flag).removeprefix("--"), text, SET)


def in_a_line(known: Setting, value: Any, name: str | None = None) -> Given:
    field = (name or known.name).removeprefix("--")
    item = parse_line(1, json.dumps({"prompt": "hi", field: value}).encode())
    assert isinstance(item, Item), item
    return LINE.read(item.overrides, NAMES)


def in_a_spec(known: Setting, value: Any, name: str | None = None) -> Given:
    text = value if isinstance(value, str) else json.dumps(value)
    (contender,) = read_contenders(f"sample:{(name or known.name).removeprefix('--')}={text}")
    return LINE.read(contender.method.settings, NAMES)


def by_keyword(known: Setting, value: Any, name: str | None = None) -> Given:
    keyword = (name or known.name).removeprefix("--").replace("-", "_")
    return GENERATION.read({keyword: value}, NAMES)


def everywhere(
    path: Path, known: Setting, value: Any, name: str | None = None
) -> dict[str, Callable[[], Given]]:
    """Yields each way to give a setting."""
    ways = {
        "flag": lambda: as_flag(known, value, name),
        "file": lambda: in_file(path, known, value, name),
        "set": lambda: by_set(known, value, name),
        "line": lambda: in_a_line(known, value, name),
        "keyword": lambda: by_keyword(known, value, name),
    }
    # all methods share the seed; commas separate methods
    if known.name != "seed" and not isinstance(value, list):
        ways["spec"] = lambda: in_a_spec(known, value, name)
    return ways


def values_of(known: Setting) -> st.SearchStrategy[Any]:
    """Draws values in range, as in JSON and TOML."""
    high = min(known.high, 10**12)
    if known.kind == "whole":
        return st.integers(int(known.low), int(high))
    if known.kind == "number":
        return st.floats(known.low, high, exclude_min=known.low_is_open, allow_subnormal=False)
    return {
        "switch": st.booleans(),
        "text": st.text("abcxyz", min_size=1),
        "choice": st.sampled_from(known.choices or ("none",)),
        "texts": st.sampled_from(["3=-1.5", "4=2", "7=-inf"])
        if known.name == "logit_bias"
        else st.lists(st.text("abcxyz ", min_size=1), min_size=1, max_size=3),
    }[known.kind]


@examples(60)
@given(st.data())
@pytest.mark.parametrize("known", KNOWN, ids=lambda k: k.name)
def test_a_setting_has_the_same_value_wherever_it_is_typed(
    known: Setting, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "settings.toml"
    value = data.draw(values_of(known))
    found = {way: read() for way, read in everywhere(path, known, value).items()}
    assert all(each == found["keyword"] for each in found.values()), found
    assert list(found["keyword"]) == [known.name]
    expected = value if known.kind in ("number", "whole", "switch", "choice") else None
    assert expected is None or found["keyword"][known.name] == expected


@pytest.mark.parametrize("known", NUMBERS, ids=lambda k: k.name)
def test_a_setting_has_the_same_range_and_error_wherever_it_is_typed(known: Setting, tmp_path: Path) -> None:
    outside = [known.low - 1] + ([] if math.isinf(known.high) else [known.high + max(1, known.high * 1e-3)])
    for value in outside + ([known.low] if known.low_is_open else []):
        wrong = int(value) if known.whole else float(value)
        messages = {}
        for way, read in everywhere(tmp_path / "settings.toml", known, wrong).items():
            with pytest.raises(UsageError) as caught:
                read()
            said, _, problem = caught.value.message.removeprefix(f"{tmp_path / 'settings.toml'}: ").partition(
                " is "
            )
            words = {"flag": FLAGS, "file": KEYS, "set": SET}.get(way, NAMES)
            assert said == words.said(known), way
            messages[way] = problem
        assert len(set(messages.values())) == 1, messages
        assert messages["flag"].endswith(f"; it must be {known.span()}")


@pytest.mark.parametrize("known", KNOWN, ids=lambda k: k.name)
def test_a_value_of_another_kind_is_refused_wherever_it_is_typed(known: Setting, tmp_path: Path) -> None:
    wrong: Any = {"nested": True} if known.kind != "texts" and known.name not in OBJECTS else 3.5
    messages = set()
    for way, read in everywhere(tmp_path / "settings.toml", known, wrong).items():
        if way in ("flag", "set", "file", "spec"):  # typer's own errors; text stays text; not JSON; colons
            continue
        with pytest.raises(UsageError, match=f"^{known.name} ") as caught:
            read()
        messages.add(caught.value.message)
    assert len(messages) == 1


ALIASED = [(known, name) for known in KNOWN for name in known.aliases]


@pytest.mark.parametrize(("known", "name"), ALIASED, ids=lambda x: x if isinstance(x, str) else "")
def test_other_programs_names_are_understood_wherever_they_are_typed(
    known: Setting, name: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"texts": ["stop"], "text": "x", "switch": True}
    value = given.get(known.kind, 1)
    for spelling in (name, "--" + name.removeprefix("--").replace("-", "_")):
        for way, read in everywhere(tmp_path / "settings.toml", known, value, spelling).items():
            assert list(read()) == [known.name], way


@pytest.mark.parametrize("known", [k for k in KNOWN if k.aliases], ids=lambda k: k.name)
def test_one_setting_under_two_names_is_an_error_wherever_it_is_typed(known: Setting, tmp_path: Path) -> None:
    main, other = known.flag.removeprefix("--"), known.aliases[0].removeprefix("--")
    value: Any = "x" if known.kind in ("text", "texts") else known.kind == "switch" or 1
    flags = (known.flag, str(value), f"{known.aliases[0]}={value}")
    if known.kind == "switch":
        flags = (known.flag, known.aliases[0])
    toml = tmp_path / "settings.toml"
    toml.write_text(f"{main} = {json.dumps(value)}\n{other} = {json.dumps(value)}\n")
    line = parse_line(1, json.dumps({"prompt": "hi", main: value, other: value}).encode())
    assert isinstance(line, Item)
    for read in (
        lambda: typed_as_flags(*flags),
        lambda: read_settings(toml, GENERATION),
        lambda: LINE.read(line.overrides, NAMES),
        lambda: GENERATION.read({main.replace("-", "_"): value, other.replace("-", "_"): value}, NAMES),
    ):
        with pytest.raises(UsageError, match="are the same setting") as caught:
            read()
        assert caught.value.hint == "give only one of them"


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda: GENERATION.read({"repeat_penlty": 3}, NAMES), "did you mean repeat_penalty"),
        (lambda: GENERATION.read({"temprature": 3}, NAMES), "did you mean temperature"),
        (lambda: GENERATION.read_text("temprature", "3", SET), "did you mean temp"),
        (lambda: GENERATION.read_text("samples", "3", SET), "the names are temp, dynatemp-range"),
        (lambda: read_contenders("sample:topk=3"), "did you mean top_k"),
    ],
)
def test_misspelt_names(read: Callable[[], Any], says: str) -> None:
    with pytest.raises(UsageError, match="there is no setting") as caught:
        read()
    assert says in caught.value.hint


def test_a_line_is_strict_with_settings_and_lenient_with_other_fields() -> None:
    bad = parse_line(1, b'{"prompt": "hi", "temprature": 3}')
    assert isinstance(bad, BadLine)
    assert "did you mean temperature?" in bad.message
    item = parse_line(1, b'{"prompt": "hi", "predict": 3, "context": "x", "top_kk": 3, "n_predict": 4}')
    assert isinstance(item, Item)
    assert (item.extra, item.overrides) == ({"predict": 3, "context": "x", "top_kk": 3}, {"n_predict": 4})


# ---------------------------------------------------------------------------------- the command line's flags


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--temperature", "1", "x"], ["--temp", "1", "x"]),
        (["--temperature=1"], ["--temp=1"]),
        (["--max_tokens", "5"], ["--max-tokens", "5"]),
        (["--max_new_tokens=5", "--no_em_inf"], ["--max-tokens=5", "--no-em-inf"]),
        (["--stop", "--temperature", "--top_k", "1"], ["--stop", "--temperature", "--top-k", "1"]),
        (["-s", "--temperature"], ["-s", "--temperature"]),
        (["-s1", "--temperature", "2"], ["-s1", "--temp", "2"]),
        (["--em-inf", "--temperature", "2"], ["--em-inf", "--temp", "2"]),
        (["--", "--temperature"], ["--", "--temperature"]),
        (["--temprature", "1"], ["--temprature", "1"]),
        (["--temperature"], ["--temp"]),
        (["-", "--top_k", "1"], ["-", "--top-k", "1"]),
    ],
)
def test_flags_get_their_main_name_and_values_stay(arguments: list[str], found: list[str]) -> None:
    typed_as_flags()
    parameters = [_Option(k.flag, k.off, k.short, k.kind == "switch") for k in KNOWN]
    assert respelt(arguments, parameters, ALIASES["probe"]) == found


class _Option:
    """The attributes of click's options that `respelt` uses."""

    def __init__(self, flag: str, off: str, short: str, is_flag: bool) -> None:
        self.opts = [name for name in (short, flag) if name]
        self.secondary_opts = [off] if off else []
        self.is_flag = is_flag


def test_aliases_reach_the_verbs(emlocal: Callable[..., Outcome], tiny: str) -> None:
    done = emlocal("generate", "x", "--hf-repo", tiny, "--n-predict", "3", "--ctx_size", "64", "--raw")
    assert (done.code, "cut off at --max-tokens 3" in done.err) == (0, True)
    twice = emlocal("generate", "x", "--temp", "1", "--temperature", "1")
    assert twice.code == 2
    assert "error: --temp and --temperature are the same setting\n" in twice.err
    for verb, flags in (("finetune", ["--lr", "2"]), ("rl", ["--lora_alpha", "0"])):
        wrong = emlocal(verb, "--data", "d", "-o", "o", *flags)
        assert wrong.code == 2
        assert "--learning-rate is 2" in wrong.err or "--alpha is 0" in wrong.err


def test_aliases_are_not_in_the_help(emlocal: Callable[..., Outcome]) -> None:
    for verb in ("generate", "finetune"):
        shown = emlocal(verb, "--help").out
        assert "--max-tokens" in shown
        assert "--max-new-tokens" not in shown


def test_no_name_means_two_settings() -> None:
    for verb in ("generate", "chat", "batch", "eval", "bench", "finetune", "rl"):
        __import__(f"emlocal.cli.{verb}")
        assert not ALIASES[verb].keys() & set(ALIASES[verb].values()), verb
    for table in (GENERATION, LINE):
        spelt = [name for known in table.settings.values() for name in spelt_of(known)]
        assert len(spelt) == len(set(spelt))


def spelt_of(known: Setting) -> set[str]:
    return {name.removeprefix("--").replace("-", "_") for name in (*known.flags, known.name)}


# ------------------------------------------------------------------------------------------ Python, EM steps


def test_pythons_keywords_are_the_table() -> None:
    hints = get_type_hints(Settings)
    shipped = EMInf, AdaptiveTemperature
    new = em_table([step for step in EM_STEPS if step not in shipped]).settings.keys()
    missing = GENERATION.settings.keys() - hints.keys()
    assert missing <= new - em_table(shipped).settings.keys()  # a new step need not be in it
    assert hints.keys() <= GENERATION.settings.keys() | {"em", "system", "raw"}
    kinds = {"number": float, "whole": int, "switch": bool, "choice": str, "text": str}
    for known in KNOWN:
        if known.name not in missing and known.name not in OBJECTS:
            assert known.kind == "texts" or hints[known.name] is kinds[known.kind]


def test_pythons_keywords_are_checked_and_take_other_names() -> None:
    model = Model(FakeBackend(hashed, sequences=8), 1)
    plain = model.generate("hi", temperature=1.5, max_tokens=5, em=True, em_steps=3)
    other: Mapping[str, Any] = {"temp": 1.5, "max_new_tokens": 5, "em_inf": True, "em_steps": 3}
    assert model.generate("hi", **other).tokens == plain.tokens  # type: ignore[arg-type]
    for wrong, says in (
        ({"em": True, "em_inf": True}, "em and em_inf are the same setting"),
        ({"em": "paper", "em_preset": "paper"}, "em and em_preset are the same setting"),
        ({"em": False, "em_steps": 3}, "em_steps has no effect without em_inf"),
        ({"top_k": -1}, "top_k is -1; it must be between 0 and"),
    ):
        with pytest.raises(UsageError, match=says):
            model.generate("hi", **wrong)  # type: ignore[arg-type]


def test_a_new_em_step_is_a_line_in_the_table() -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True)
    class Sharpen:
        name: ClassVar[str] = "sharpen"
        flag: ClassVar[str] = "--sharpen"
        help: ClassVar[str] = "Square the probabilities."
        power: float = setting(2.0, "--em-power", 1, 9, "The power.")
        threshold: float = setting(0.7, "--em-threshold", 0, 9, "δ in nats.")

    table = em_table([*EM_STEPS, Sharpen])  # type: ignore[list-item]
    new = table.settings.keys() - EM.settings.keys()
    assert new == {"sharpen", "em_power"}
    assert table.settings["sharpen"].off == "--no-sharpen"
    help = table.settings["em_threshold"].full_help
    assert help.endswith("(default: 0.3; 0.1 with --adaptive-temp; 0.7 with --sharpen)")


def test_every_step_can_be_switched_on_and_set() -> None:
    for step in EM_STEPS:
        (switch,) = (k for k in KNOWN if k.flag == step.flag)
        assert type(resolve_settings(("flag", {switch.name: True})).params.em) is step
    assert resolve_settings(("flag", {"em_inf": True, "em_kl_weight": 0.5})).params.em == EMInf(kl_weight=0.5)
    assert isinstance(EM | SAMPLING, Table)
