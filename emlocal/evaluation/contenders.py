"""What is compared: methods as people write them (`emlocal.methods`), and their settings in words.

What an evaluation is besides its methods' settings. No numpy: `emlocal eval --help` reads this.
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
    """As it was written."""
    method: Chosen

    def plan(self, base: Plan, chosen: frozenset[str]) -> Plan:
        """The base's settings as this method has them. `chosen`: fields that were set on purpose.

        Raises UsageError where the settings contradict each other.
        """
        # --temp is for those that sample; greedy stands beside them
        method = self.method
        plan = method.plan(base, chosen - method.drawing.fixed - method.collecting.fixed)
        try:
            self.method.collecting.check(plan.params)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error.message}", error.hint) from None
        return plan


def read_contenders(text: str, allow_code: bool = False) -> list[Contender]:
    """The contenders of a comma-separated list; with `allow_code`, methods that run code have leave to.

    Raises UsageError for one that is unknown, or given twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods names none", "name some, such as greedy,sample:1,em-inf:paper")
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--methods has {name} twice")
    return [Contender(name, with_leave(name, allow_code)) for name in names]


def describe(contender: Contender, plan: Plan, base: Plan) -> str:
    """The settings in words: "T 0.8, min-p 0.05, EM-INF δ 0.3 …; the majority of 4".

    What `base` has too is left out where it is no setting of the draw: limits and stops.
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
    """What is asked, and what becomes of it."""

    data: Path | None = setting(
        None, "--data", help="Problems, .jsonl or .json; without it, from the hub.", metavar="FILE"
    )
    targets: Path | None = setting(
        None, "--targets", help="SciCode's test_data.h5, for problems without gold code.", metavar="FILE"
    )
    limit: int | None = setting(None, "--limit", 1, help="Only the first N problems.")
    samples: int = setting(
        1, "-n --samples --n --num-return-sequences", 1, 1024, "Answers to each: mean@N and pass@k."
    )
    system: str | None = setting(
        None, "--system --system-prompt", help="System message, instead of the task's.", metavar="TEXT"
    )
    calibrate: Path | None = setting(
        None, "--calibrate", help="Fit a calibration of the one method, and write it.", metavar="FILE"
    )
    output: Path | None = setting(
        None, "-o --output --output-dir", help="Folder. (default: eval-TASK-MODEL)", metavar="DIR"
    )
    allow_code: bool = setting(False, "--allow-code", help="Run code that the model writes, contained.")
    code_seconds: float | None = setting(
        None,
        "--code-seconds",
        0,
        3600,
        "For such a program. (default: 10; scicode 300)",
        low_is_open=True,
        unit="seconds",
    )
    resume: bool = setting(
        True, "--resume/--restart", help="Go on with answers that are there, or begin anew."
    )
    parallel: int | None = setting(
        None, "--parallel --max-num-seqs", 1, 256, "Sequences at once. (default: 16, or as memory allows)"
    )
    quiet: bool = setting(False, "-q --quiet", help="Only the table.")
