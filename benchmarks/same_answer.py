"""Measures how often a model rightly judges whether two short answers say the same, as `--cluster model` asks.

Each of 24 questions has an answer, a rewording of it, and a different answer. The model gets the prompts of a
vote, in both orders. "same" counts the rewordings that it calls the same, "different" the different answers
that it does not.

    python benchmarks/same_answer.py MODEL.gguf ...
"""

# ruff: noqa: E501
import sys

import emlocal
from emlocal.evaluation.statistics import wilson
from emlocal.methods.clustering import VERDICT, asked_about, is_yes, normalised

PAIRS = (
    ("Who wrote Hamlet?", "William Shakespeare", "It was written by Shakespeare.", "Christopher Marlowe"),
    ("What is the capital of Australia?", "Canberra", "The capital is Canberra.", "Sydney"),
    ("When did the Second World War end?", "1945", "It ended in the year 1945.", "1939"),
    ("Why is the sky blue?", "Air scatters blue light most.", "Blue light is scattered more by the air.", "It reflects the sea."),
    ("Which planet is the largest?", "Jupiter", "The largest planet is Jupiter.", "Saturn"),
    ("What does a thermometer measure?", "Temperature", "It measures how hot something is.", "Air pressure"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci", "Da Vinci painted it.", "Michelangelo"),
    ("What is water made of?", "Hydrogen and oxygen", "Two hydrogen atoms and one oxygen atom.", "Carbon and oxygen"),
    ("How many legs has a spider?", "Eight", "A spider has 8 legs.", "Six"),
    ("What is the opposite of hot?", "Cold", "The opposite is cold.", "Warm"),
    ("Where is the Eiffel Tower?", "In Paris", "Paris, the capital of France.", "In London"),
    ("Which gas do plants take in?", "Carbon dioxide", "They take in CO2.", "Nitrogen"),
    ("Who discovered penicillin?", "Alexander Fleming", "Fleming discovered it.", "Louis Pasteur"),
    ("What is the longest river of Africa?", "The Nile", "It is the river Nile.", "The Congo"),
    ("Which language is spoken in Brazil?", "Portuguese", "Brazilians speak Portuguese.", "Spanish"),
    ("What do bees make?", "Honey", "They produce honey.", "Silk"),
    ("How often are the Summer Olympics held?", "Every four years", "Once in 4 years.", "Every year"),
    ("What causes tides?", "The moon's gravity", "The gravitational pull of the moon.", "The wind"),
    ("What is the currency of Japan?", "The yen", "Japan uses the yen.", "The won"),
    ("Which organ pumps blood?", "The heart", "Blood is pumped by the heart.", "The liver"),
    ("At what temperature does water boil?", "100 degrees Celsius", "212 degrees Fahrenheit.", "50 degrees Celsius"),
    ("Who was the first person on the moon?", "Neil Armstrong", "Armstrong was the first.", "Buzz Aldrin"),
    ("What is a baby cat called?", "A kitten", "It is called a kitten.", "A puppy"),
    ("Why do leaves turn brown in autumn?", "They lose their chlorophyll.", "The chlorophyll breaks down.", "They freeze."),
)  # fmt: skip


def judged(model: emlocal.Model, question: str, a: str, b: str) -> bool:
    """Whether the model calls two answers the same, in both orders."""
    if normalised(a) == normalised(b):
        return True
    return all(
        is_yes(
            model.generate(
                [{"role": "user", "content": asked_about(question, *pair)}],
                method="greedy",
                max_tokens=VERDICT,
            ).text
        )
        for pair in ((a, b), (b, a))
    )


def main() -> None:
    for path in sys.argv[1:]:
        with emlocal.load(path) as model:
            same = sum(judged(model, question, a, b) for question, a, b, _ in PAIRS)
            other = sum(not judged(model, question, a, c) for question, a, _, c in PAIRS)
        for name, right in (("same", same), ("different", other)):
            interval = wilson(right, len(PAIRS))
            print(
                f"{path}: {name} {right} of {len(PAIRS)} right, {interval.low:.0%} to {interval.high:.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
