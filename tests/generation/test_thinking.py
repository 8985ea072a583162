"""Thoughts are parted from answers however the bytes come in pieces."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.generation.thinking import FORMS, Form, Splitter, form_of, opens

THINK, MISTRAL, HARMONY, GEMMA, *_ = FORMS


def split(form: Form, stream: str, *, inside: bool = False, cuts: list[int] | None = None) -> tuple[str, str]:
    raw = stream.encode()
    ends = sorted(
        {min(cut, len(raw)) for cut in (cuts if cuts is not None else range(len(raw)))} | {0, len(raw)}
    )
    splitter, thought, answer = Splitter(form, inside=inside), b"", b""
    for a, b in pairwise(ends):
        more, said = splitter.push(raw[a:b])
        thought, answer = thought + more, answer + said
    more, said = splitter.finish()
    return (thought + more).decode(), (answer + said).decode()


CASES = [
    (THINK, "<think>\nIt is 3.\n</think>\n\nThree.", False, "It is 3.", "Three."),
    (THINK, "\n<think>a</think>b", False, "a", "b"),
    (THINK, "It is 3.\n</think>\n\nThree.", True, "It is 3.", "Three."),
    (THINK, "  Three <think>.", False, "", "  Three <think>."),  # too late: part of the answer
    (THINK, "<thin air", False, "", "<thin air"),
    (THINK, "<think>never ends", False, "never ends", ""),
    (THINK, "never ends </thi", True, "never ends </thi", ""),
    (THINK, "</think>\n\nThree.", False, "", "Three."),
    (THINK, "<think>\n\n</think>\n\nThree.", False, "", "Three."),
    (THINK, "<think>a</think>b</think>c", False, "a", "b</think>c"),
    (THINK, "<think>a < b\n\n and so</think> x\n", False, "a < b\n\n and so", "x\n"),
    (THINK, "", False, "", ""),
    (THINK, "\n\n", False, "", ""),
    (THINK, "<think>é…</think>ß", False, "é…", "ß"),
    (MISTRAL, "[THINK]a[/THINK]b", False, "a", "b"),
    (HARMONY, "<|channel|>analysis<|message|>a" + HARMONY.closing + "b", False, "a", "b"),
    (HARMONY, "<|channel|>analysis<|message|>an <|end|><|start|>user", False, "an <|end|><|start|>user", ""),
    (HARMONY, "<|channel|>final<|message|>b", False, "", "b"),
    (GEMMA, "<|channel>thought\na\n<channel|>b", False, "a", "b"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "stream", "inside", "thought", "answer"), CASES)
def test_by_hand(form: Form, stream: str, inside: bool, thought: str, answer: str) -> None:
    assert split(form, stream, inside=inside) == (thought, answer)
    assert split(form, stream, inside=inside, cuts=[]) == (thought, answer)


@given(
    st.sampled_from(FORMS),
    st.text(alphabet="<>/|[]thinkTHINKcael \n.é", max_size=60),
    st.booleans(),
    st.lists(st.integers(0, 80), max_size=8),
)
def test_pieces_change_nothing(form: Form, stream: str, inside: bool, cuts: list[int]) -> None:
    assert split(form, stream, inside=inside, cuts=cuts) == split(form, stream, inside=inside, cuts=[])


@given(
    st.sampled_from(FORMS),
    st.text(alphabet="abc< \n|", max_size=20),
    st.text(alphabet="xyz> \n", max_size=20),
)
def test_what_was_put_together_comes_apart(form: Form, thought: str, answer: str) -> None:
    if form.ends in thought + form.ends[:-1]:
        return
    stream = form.begins + thought + form.before_end + form.ends + answer
    assert split(form, stream) == (thought.strip(), answer.lstrip())


def test_forms_are_found_in_templates() -> None:
    assert form_of("{{ m.content.split('</think>') }}") == THINK
    assert form_of("{{ '<|channel|>final<|message|>' + m.content }}") == HARMONY
    assert form_of("{{ m.role }}") is None


@pytest.mark.parametrize(
    ("form", "prompt", "inside"),
    [
        (THINK, "<|im_start|>assistant\n<think>\n", True),
        (THINK, "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        (THINK, "<|im_start|>assistant\n", False),
        (GEMMA, "<|turn>model\n<|channel>thought\n", True),
        (GEMMA, "<|turn>model\n<|channel>thought\n<channel|>", False),
    ],
)
def test_a_prompt_may_open_the_thought(form: Form, prompt: str, inside: bool) -> None:
    assert opens(form, prompt) is inside
