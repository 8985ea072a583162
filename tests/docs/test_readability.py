"""README and the tutorial are easy to read; docs/style.md has the targets."""

import runpy

import pytest

from tests.docs.pages import ROOT

MEASURE = runpy.run_path(str(ROOT / "docs" / "readability.py"))
reading, sentences = MEASURE["reading"], MEASURE["sentences"]


@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md"])
def test_the_page_is_easy_to_read(name: str) -> None:
    found = reading((ROOT / name).read_text(encoding="utf-8"))
    assert found.words > 300
    assert found.sentence <= MEASURE["LONGEST"]
    assert found.ease >= MEASURE["EASIEST"]


def test_a_hard_text_misses_the_targets() -> None:
    text = "The institutionalization of methodological considerations, where applicable, necessitates " * 3
    found = reading(text)
    assert found.sentence > MEASURE["LONGEST"]
    assert found.ease < MEASURE["EASIEST"]


def test_only_prose_counts() -> None:
    page = """# A heading of a page

One `flag` and [a link](page.md) of 0.97 nats. It ends:

```console
$ not a sentence at all
```

| no | table |
|---|---|

- An item without a stop
- a second item

    y = an equation of x
"""
    assert sentences(page) == [
        "One Code and a link of 0.97 nats.",
        "It ends:",
        "An item without a stop",
        "a second item",
    ]
