"""Contenders of an evaluation: methods as people write them, with their settings in words.

Also the settings of an evaluation itself. `emlocal.methods` parses the methods. This module imports no numpy,
because `emlocal eval --help` imports it.
"""

from dataclasses import dataclass
from pathlib import Path

from emlocal.errors import UsageError
from emlocal.methods import Chosen, with_leave
from emlocal.settings import Plan, describe_em
from emlocal.settings.table import setting
from emlocal.text import counted


@dataclass(frozen=True)
class Contender:
    """One method with its settings."""

    name: str
    """The name as it was written."""
    method: Chosen

    def plan(self, base: Plan, chosen: frozenset[str]) -> Plan:
        """Returns the base plan with this method's settings.

        `chosen`: settings that the user chose explicitly.

        Raises UsageError if the settings contradict each other.
        """
        # --temp is meant for the methods that sample; greedy, beside them, keeps its own.
        method = self.method
        plan = method.plan(base, chosen - method.drawing.fixed - method.collecting.fixed)
        try:
            self.method.collecting.check(plan.params)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error.message}", error.hint) from None
        return plan


def read_contenders(text: str, allow_code: bool = False) -> list[Contender]:
    """Returns the contenders of a comma-separated list. `allow_code` permits methods to run code.

    Raises UsageError for an unknown or repeated method.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods names no method", "name some, such as greedy,sample:1,em-inf:paper")
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--methods has {name} twice")
    return [Contender(name, with_leave(name, allow_code)) for name in names]


def describe(contender: Contender, plan: Plan, base: Plan) -> str:
    """Returns the settings in words: "T 0.8, min-p 0.05, EM-INF δ 0.3 …; the majority of 4".

    Limits and stops that equal those of `base` are left out.
    """
    params = plan.params
    words = ["the most probable token"] if params.temperature == 0 else [f"T {params.temperature:g}"]
    if params.temperature != 0:
        for label, value, off in (
            ("top-k", params.top_k, 0),
            ("top-p", params.top_p, 1),
            ("min-p", params.min_p, 0),
            ("± range", params.dynatemp_range, 0),
        ):
            words += [f"{label} {value:g}"] if value != off else []
    if params.penalizes:
        words.append(f"repeat penalty {params.repeat_penalty:g}")
    if params.em is not None:
        words.append(f"EM {describe_em(params.em)}")
    words += contender.method.collecting.describe(plan.samples)
    if plan.max_tokens != base.max_tokens:
        words.append(f"at most {counted(plan.max_tokens, 'token')}")
    if plan.stop != base.stop:
        words.append(f"stops {list(plan.stop)}")
    return ", ".join(words)


@dataclass(frozen=True)
class EvalOptions:
    """Settings of an evaluation."""

    data: Path | None = setting(
        None,
        "--data",
        help="Read problems from this .jsonl or .json file. (default: from the hub)",
        metavar="FILE",
    )
    targets: Path | None = setting(
        None,
        "--targets",
        help="Read targets from SciCode's test_data.h5, for problems without gold code.",
        metavar="FILE",
    )
    limit: int | None = setting(None, "--limit", 1, help="Use only the first N problems.")
    samples: int = setting(
        1,
        "-n --samples --n --num-return-sequences",
        1,
        1024,
        "Set the number of answers to each problem, for mean@N and pass@k.",
    )
    system: str | None = setting(
        None, "--system --system-prompt", help="Set the system message. (default: the task's)", metavar="TEXT"
    )
    calibrate: Path | None = setting(
        None,
        "--calibrate",
        help="Fit a calibration of the method's confidence and write it here.",
        metavar="FILE",
    )
    output: Path | None = setting(
        None,
        "-o --output --output-dir",
        help="Write results to this folder. (default: eval-TASK-MODEL)",
        metavar="DIR",
    )
    allow_code: bool = setting(
        False, "--allow-code", help="Allow programs that the model writes to run, in a sandbox."
    )
    code_seconds: float | None = setting(
        None,
        "--code-seconds",
        0,
        3600,
        "Set the CPU-time limit of each program, in seconds. (default: 10; scicode 300)",
        low_is_open=True,
        unit="seconds",
    )
    resume: bool = setting(
        True, "--resume/--restart", help="Keep answers from an earlier run, or discard them."
    )
    parallel: int | None = setting(
        None,
        "--parallel --max-num-seqs",
        1,
        256,
        "Set the number of sequences at once. (default: 16, or as memory allows)",
    )
    quiet: bool = setting(False, "-q --quiet", help="Print the table only.")
