"""What an evaluation is besides its methods' settings. No numpy: `emlocal eval --help` reads this."""

from dataclasses import dataclass
from pathlib import Path

from emlocal.settings.table import setting


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
