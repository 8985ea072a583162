"""Guessed tokens with llama.cpp, through the program's own parts."""

import emlocal
from emlocal.models.resolve import GGUFModel

PROMPTS = [f"one two three {i} one two three {i} one two" for i in range(8)]


def answers(model: GGUFModel, mode: str, temperature: float) -> tuple[list[list[int]], int]:
    """Returns the tokens of each answer, and the number of passes."""
    with emlocal.load(model.path, threads=1, context=256, speculate=mode) as loaded:
        done = [
            loaded.generate(p, raw=True, em=temperature > 0, max_tokens=40, seed=3, temperature=temperature)
            for p in PROMPTS
        ]
        return [answer.tokens for answer in done], loaded.runner.counters.steps


def test_llama_cpp_says_the_same(tiny_model: GGUFModel) -> None:
    """A pass of several rows rounds differently, so that a near tie may be drawn otherwise."""
    for temperature in (0.0, 0.8):
        plain, steps = answers(tiny_model, "off", temperature)
        for mode in ("lookup", "auto"):
            found, fewer = answers(tiny_model, mode, temperature)
            assert sum(a == b for a, b in zip(found, plain, strict=True)) >= 6
            assert fewer <= steps
            assert temperature or mode == "auto" or fewer < steps
