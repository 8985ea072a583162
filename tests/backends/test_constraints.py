"""Constraints on every engine: tiny models with random weights must still answer in form."""

import json
import re

import jsonschema
import pytest

from emlocal.backends.base import Backend
from emlocal.em.steps import EMInf
from emlocal.generation import Completion, Job, Request, Scheduler
from emlocal.sampling import SamplingParams, Uniforms
from emlocal.settings.constraint import Constraint
from tests.backends.contract import tokens

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["the", "a tin", 12]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
EMS = [None, EMInf(threshold=0.2, steps=6, learning_rate=1.0)]


def answers(backend: Backend, constraint: Constraint, em: EMInf | None, most: int = 60) -> list[Completion]:
    params = SamplingParams(temperature=1.0, min_p=0.0, em=em)
    requests = [Request(params, Uniforms(3, 0, i), most, constraint=constraint) for i in range(2)]
    with Scheduler(backend, 2) as runner:
        handle = runner.submit(Job(tokens(backend, "1 + 1 ="), requests))
        while not runner.idle:
            runner.step()
        return handle.result()


@pytest.mark.parametrize("em", EMS)
def test_a_regex(backend: Backend, em: EMInf | None) -> None:
    pattern = r"(yes|no), [a-e]{2,4}é?"
    for done in answers(backend, Constraint("regex", pattern), em):
        assert re.fullmatch(pattern, done.text)
        assert (done.finish_reason, done.complete) == ("stop", True)


@pytest.mark.parametrize("em", EMS)
def test_a_schema(backend: Backend, em: EMInf | None) -> None:
    for done in answers(backend, Constraint("json_schema", json.dumps(SCHEMA)), em, 110):
        if done.finish_reason == "stop":
            jsonschema.validate(json.loads(done.text), SCHEMA)
        assert done.complete is (done.finish_reason == "stop")
