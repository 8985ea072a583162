"""Every chat template in llama.cpp's source renders as in transformers, or is refused by both."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from emlocal.generation.dialogue import Dialogue, fitted, left_out
from emlocal.generation.prompt import chat_tokens
from emlocal.models import template_worker
from emlocal.models.template_traits import opening, traits
from emlocal.models.templates import Outcome
from tests.dialogues import ANSWERED, CALLING, PARTS, QUESTION, SYSTEM, TALK, TOOLS, backend_with
from tests.llama_cpp_templates import templates

BOS, EOS = "<s>", "</s>"
SHAPES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool]] = {
    "a question": ([QUESTION], None, True),
    "a system message": ([SYSTEM, QUESTION], None, True),
    "several turns": (TALK, None, True),
    "an answer last": (ANSWERED, None, False),
    "content in parts": (PARTS, None, True),
    "tools": (CALLING, TOOLS, True),
}
# Hermes' and Command-R+'s templates for tools, and firefunction's, render nothing without tools.
FOR_TOOLS_ONLY = ("CohereForAI-c4ai-command-r-plus", "NousResearch-Hermes", "fireworks-ai-llama-3")


@pytest.fixture(scope="module")
def all_templates() -> dict[str, str]:
    found = templates()
    assert len(found) >= 60
    return found


def in_transformers(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    generating: bool,
    continued: bool = False,
) -> str | None:
    """What transformers makes of it; None where it refuses."""
    try:
        texts, _ = render_jinja_template(
            [messages],
            chat_template=template,
            tools=tools,
            bos_token=BOS,
            eos_token=EOS,
            add_generation_prompt=generating,
            continue_final_message=continued,
        )
    except Exception:  # noqa: BLE001 (a template may fail in any way)
        return None
    text: str = texts[0]
    return text


def here(
    template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, generating: bool
) -> Outcome:
    values = {"bos_token": BOS, "eos_token": EOS, "add_generation_prompt": generating}
    return template_worker.rendered(template, messages, {**values, "tools": tools, "documents": None})


def test_the_same_text_or_refused_by_both(all_templates: dict[str, str]) -> None:
    rendered = dict.fromkeys(SHAPES, 0)
    for name, template in all_templates.items():
        for shape, asked in SHAPES.items():
            expected = in_transformers(template, *asked)
            kind, text = here(template, *asked)
            if expected is None:
                assert kind in ("refused", "failed"), (name, shape, kind, text)
            else:
                assert (kind, text) == ("text", expected), (name, shape)
                rendered[shape] += 1
    print(f"of {len(all_templates)} rendered by both, the others refused by both: {rendered}")
    assert rendered.pop("content in parts") > 0.4 * len(all_templates)
    assert min(rendered.values()) > 0.7 * len(all_templates)


def test_what_a_person_says_is_in_the_prompt(all_templates: dict[str, str]) -> None:
    """Also where the template takes no system message or wants parts; or it is refused in words."""
    for name, template in all_templates.items():
        if name.startswith(FOR_TOOLS_ONLY):
            continue
        info = backend_with(template, bos=BOS, eos=EOS).info
        warnings: list[str] = []
        asked = fitted(info, Dialogue((SYSTEM, QUESTION)), warnings.append)
        kind, text = here(template, [dict(m) for m in asked], None, True)
        assert kind == "text", (name, text)
        assert left_out(info, asked, text) == [], name
        assert SYSTEM["content"] in text, name
        assert bool(warnings) == (traits(template, BOS, EOS).system != "shown"), name
        assert opening(template, bos=BOS, eos=EOS) in text


def test_answers_go_on_as_in_transformers(all_templates: dict[str, str]) -> None:
    same = 0
    for name, template in all_templates.items():
        expected = in_transformers(template, ANSWERED, None, False, continued=True)
        if expected is None:
            continue
        backend = backend_with(template, bos=BOS, eos=EOS)
        assert bytes(chat_tokens(backend, ANSWERED)).decode() == expected, name
        same += 1
    assert same > 0.7 * len(all_templates)


def test_both_ways_of_rendering_are_the_same(all_templates: dict[str, str]) -> None:
    """In the process for strangers as here: the newest templates are the longest."""
    name = max(all_templates, key=lambda name: len(all_templates[name]))
    template = all_templates[name]
    backend = backend_with(template, bos=BOS, eos=EOS)
    expected = in_transformers(template, TALK, None, True)
    assert expected is not None
    assert bytes(chat_tokens(backend, TALK)).decode() == expected
