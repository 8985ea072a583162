"""Files to plot, written by the code that writes them for users."""

import json
from pathlib import Path
from xml.etree import ElementTree

from emlocal.backends.fake import END, FakeBackend
from emlocal.evaluation.report.document import write_json
from emlocal.generation import Job, Request, Scheduler, Token
from emlocal.rendering import trace_to
from emlocal.sampling import SamplingParams, Uniforms
from emlocal.settings import EMInf
from tests.evaluation.test_report import made


def trace(path: Path, tokens: int = 12, samples: int = 1, *, em: bool = True) -> Path:
    """Writes a trace like `generate --trace` for the fake engine."""
    settings = EMInf() if em else None
    params = SamplingParams(temperature=1.0, em=settings, logit_bias=((END, float("-inf")),))
    requests = [Request(params, Uniforms(0, 0, i), tokens) for i in range(samples)]
    backend = FakeBackend(sequences=samples + 1)
    with trace_to(path, backend) as writer:
        assert writer is not None
        for event in Scheduler(backend, samples).follow([Job([1, 2], requests, at_once=True)]):
            if isinstance(event, Token):
                writer.add(event.sample, event.draw)
    return path


def evaluation(folder: Path, repetitions: int = 1) -> Path:
    """Writes an evaluation like `eval`: greedy (2 of 6 right) and em-inf:paper (4 of 6)."""
    folder.mkdir(parents=True)
    write_json(made(repetitions), folder / "results.json")
    return folder


def run(folder: Path, rows: list[dict[str, object]], end: str = "") -> Path:
    """Writes a run's folder with these metrics."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + end, encoding="utf-8")
    return folder


def rows(n: int = 4, **more: float) -> list[dict[str, object]]:
    return [
        {"step": i, "entropy": 1.0 / (i + 1), "length": 50.0 + i, "repetition": 0.1, "kl": None, **more}
        for i in range(n)
    ]


def texts(path: Path) -> set[str]:
    """Returns the texts of an SVG, which matplotlib writes as comments beside their outlines."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    tree = ElementTree.parse(path, parser)
    comments = (each.text for each in tree.iter() if each.tag is ElementTree.Comment)
    return {text.strip() for text in comments if text}
