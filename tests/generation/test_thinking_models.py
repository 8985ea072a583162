"""Models that think, end to end, with short templates in the manner of Qwen3, R1, gpt-oss and Gemma 4.

No such model is at hand, so the engine without a model says what they would say; its tokens are bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import emlocal
from emlocal.backends.fake import END, VOCABULARY, FakeBackend
from emlocal.batch.lines import parse_line
from emlocal.batch.run import Batch
from emlocal.chat.session import ChatSession
from emlocal.chat.talk import Turn
from emlocal.generation import Scheduler
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.settings import Plan, SamplingParams
from emlocal.training.rollouts import draw_rollouts
from emlocal.training.settings import FineTuneSettings
from tests.batch.batches import settings

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
THOUGHT, SAID = r"It may be \boxed{3}.", r"It is \boxed{4}."
ASK = {"role": "user", "content": "2 + 2?"}


@dataclass(frozen=True)
class Model:
    """A way to think: the template, and what the model writes after a prompt."""

    template: str
    begins: str
    ends: str
    opened: bool = False
    """The prompt opens the thought."""
    switch: bool = True
    """The template can switch thoughts off."""


MODELS = {
    "qwen3": Model(
        TURNS + "[assistant]{% if enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% endif %}",
        "<think>\n",
        "\n</think>\n\n",
    ),
    "r1": Model(
        TURNS + "[assistant]<think>\n{# </think> #}", "", "\n</think>\n\n", opened=True, switch=False
    ),
    "gpt-oss": Model(
        "{{ reasoning_effort }}" + TURNS + "[assistant]{# <|channel|>final<|message|> #}",
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        switch=False,
    ),
    "gemma4": Model(
        "{% if enable_thinking %}<|think|>{% endif %}" + TURNS + "[assistant]"
        "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}",
        "<|channel>thought\n",
        "\n<channel|>",
    ),
}  # fmt: skip


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


def backend(model: Model, sequences: int = 8) -> FakeBackend:
    """Thinks and answers, or answers alone where the prompt has closed the thought."""

    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        text = bytes(t for t in tokens if t < END).decode(errors="replace").rpartition("[assistant]")[2]
        closed = next((e for e in ("</think>\n\n", "<channel|>", "final<|message|>") if e in text), None)
        thinking = model.begins + THOUGHT + model.ends
        if closed is not None:
            reply, said = SAID, text.rpartition(closed)[2]
        else:
            reply, said = thinking, text.removeprefix("<think>\n") if model.opened else text
        row = np.zeros(VOCABULARY, dtype=np.float32)
        going_on = reply.startswith(said) and len(said) < len(reply)
        row[ord(reply[len(said)]) if going_on else END] = 60
        return row

    return FakeBackend(script, chat_template=model.template, sequences=sequences, shared=False)


def thinks(model: Model) -> dict[str, Any]:
    return {"think": True} if model is MODELS["gemma4"] else {}  # whose default is not to


def test_from_python(model: Model) -> None:
    with emlocal.Model(backend(model), 2) as loaded:
        answer = loaded.generate([ASK], temperature=0, **thinks(model))
        assert (answer.reasoning, answer.text) == (THOUGHT, SAID)
        assert 0 < answer.reasoning_tokens < len(answer.tokens)
        assert "".join(loaded.stream([ASK], temperature=0, **thinks(model))) == SAID
        short = loaded.generate([ASK], temperature=0, think_budget=4, **thinks(model))
        assert short.text == SAID
        assert THOUGHT.startswith(short.reasoning)
        assert short.reasoning_tokens < answer.reasoning_tokens
        raw = loaded.generate(r"2 + 2?[assistant]", temperature=0, raw=True)
        assert raw.reasoning_tokens == 0


def test_switched_off(model: Model, recwarn: pytest.WarningsRecorder) -> None:
    with emlocal.Model(backend(model), 2) as loaded:
        answer = loaded.generate([ASK], temperature=0, think=False)
    assert answer.text == SAID
    assert (answer.reasoning == "") is model.switch
    assert any("no switch for thoughts" in str(w.message) for w in recwarn) is not model.switch


def test_rows_and_votes_look_at_the_answer(model: Model) -> None:
    own = {"chat_template_kwargs": {"enable_thinking": True}}
    short = len(model.begins) + 6  # within the thought
    each = {"plain": thinks(model), "short": {"max_tokens": short, **thinks(model)}, "own": own}
    each["off"] = {"enable_thinking": False}
    lines = [{"custom_id": name, "messages": [ASK], "temperature": 0, **more} for name, more in each.items()]
    items = [parse_line(i, json.dumps(line).encode()) for i, line in enumerate(lines, 1)]
    engine = backend(model)
    run = Batch(engine, items, settings(max_tokens=200), runner=Scheduler(engine, 2))
    rows = {row["custom_id"]: row for row in run.rows()}
    plain = rows["plain"]
    assert (plain["reasoning"], plain["text"]) == (THOUGHT, SAID)
    assert plain["entropy_of"].keys() == {"reasoning", "answer"}
    assert (rows["short"]["text"], rows["short"]["finish_reason"]) == ("", "length")
    assert rows["off"]["text"] == rows["own"]["text"] == SAID
    assert ("reasoning" in rows["off"]) is not model.switch
    assert rows["own"]["reasoning"] == THOUGHT
    with emlocal.Model(backend(model), 2) as loaded:
        vote = loaded.generate([ASK], method="vote:4", **thinks(model))
        assert (vote.fields["answer"], vote.fields["agreement"]) == ("4", 1)
        cut = loaded.generate([ASK], method="vote:4", max_tokens=len(model.begins) + 22, **thinks(model))
        assert cut.fields["answer"] is None  # the thought's box is no answer


def test_a_chat_keeps_answers_alone(model: Model) -> None:
    engine = backend(model)
    with Scheduler(engine, 2) as runner:
        session = ChatSession(engine, runner)
        turn = Turn(Plan(SamplingParams(temperature=0), **thinks(model)))
        for _ in range(2):
            for _ in session.ask("2 + 2?", turn, lambda: False):
                pass
        assert session.conversation.exchanges == [("2 + 2?", SAID)] * 2


def test_rewards_look_at_the_answer(model: Model) -> None:
    engine = backend(model, 4 + SPARE_SEQUENCES)
    with emlocal.Model(backend(model), 2) as loaded:
        whole = loaded.generate([ASK], temperature=0, **thinks(model))
    opening = {"gemma4": "", "r1": "<think>\n"}.get(next(k for k, m in MODELS.items() if m is model), "")
    prompt = list(f"[user]2 + 2?\n[assistant]{opening}".encode())
    [rollout] = draw_rollouts(engine, [prompt], FineTuneSettings(max_tokens=200), 0, 2)
    assert rollout.text == whole.text
    assert len(rollout.answer) == len(whole.tokens) + 1  # trained on are the thoughts, too
