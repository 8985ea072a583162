"""Records the answers of emlocal's commands in one version and compares them with another.

    python benchmarks/golden.py --record FOLDER      run emlocal's commands and write FOLDER/golden.json
    python benchmarks/golden.py --compare FOLDER     run the same commands again and name what differs

`PYTHONPATH=/path/to/a/checkout` chooses the version. Every command runs with one thread, and with a folder
and a configuration of its own, so that the answers are the same on each run. Times and version numbers are
not compared. The outputs stay in FOLDER/record and FOLDER/compare, for diff.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = Path(os.environ.get("EMLOCAL_BENCH_MODELS", "~/.cache/emlocal-bench")).expanduser()
SMOLLM2, QWEN = "smollm2-135m-instruct-q4_1.gguf", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
LEFT_OUT = re.compile(
    "seconds|tok_s|per_second|wall|created|version|date|commit|machine|made_with|answered with|elapsed"
    "|packages|^cached"
)
"""Keys of JSON that hold times or versions, or how much of a prompt was cached; they are not compared."""
PROMPT = "Why is the sky blue? Answer in two sentences."
EM_CHOICES: dict[str, list[str]] = {
    "off": [],
    "greedy": ["--temp", "0"],
    "em-inf": ["--em-inf"],
    "paper": ["--em-preset", "paper"],
    "em-pt": ["--em-preset", "em-pt"],
    "adaptive": ["--adaptive-temp"],
}
METHODS = (
    "sample",
    "greedy",
    "em-inf",
    "adaptive-temperature",
    "self-consistency",
    "sequential-refinement",
    "min-p",
    "dynamic-temperature",
)
CHAT = (
    "Hello!\nWhat is 2+2?\n/regen\n/em on\nName a colour.\n/compare\n/undo\nName an animal.\n/em off\n"
    "And a plant?\n/exit\n"
)
_SMALL_RUN = [
    "--steps",
    "2",
    "--prompts-per-step",
    "2",
    "--max-tokens",
    "12",
    "--save-every",
    "1",
    "--threads",
    "1",
]


@dataclass(frozen=True)
class Case:
    """One command, and globs of the files it leaves that are compared; stdout always is."""

    name: str
    argv: list[str]
    files: tuple[str, ...] = ()
    stdin: str = ""
    kill_after_rows: tuple[str, int] | None = None
    """(file, rows): the command is killed once the file has this many lines, then run again."""


def cases() -> list[Case]:
    """Returns all commands, the quick ones first."""
    found = [*_generate(), *_chat(), *_batch(), *_training(), *_evaluation()]
    assert len({case.name for case in found}) == len(found)
    return found


def _generate() -> list[Case]:
    found = []
    for engine, model, tokens in (
        ("llama.cpp", SMOLLM2, "48"),
        ("llama.cpp", QWEN, "32"),
        ("torch", SMOLLM2, "24"),
        ("torch", QWEN, "8"),
        ("mlx", SMOLLM2, "6"),
    ):
        for name, flags in EM_CHOICES.items():
            argv = [
                "generate",
                PROMPT,
                "-m",
                model,
                "--backend",
                engine,
                "--seed",
                "7",
                "--max-tokens",
                tokens,
            ]
            argv += ["--threads", "1", "--json", "--trace", "trace.jsonl", *flags]
            found.append(Case(f"generate {engine} {model[:5]} {name}", argv, ("trace.jsonl",)))
    base = ["generate", PROMPT, "-m", SMOLLM2, "--seed", "3", "--max-tokens", "40", "--threads", "1"]
    for name, flags in {
        "three samples": ["-n", "3", "--em-inf", "--json"],
        "penalties": [
            "--repeat-penalty",
            "1.2",
            "--presence-penalty",
            "0.3",
            "--frequency-penalty",
            "0.1",
            "--json",
        ],
        "bias": ["--logit-bias", "260=-inf", "--logit-bias", "253=2", "--json"],
        "truncated": ["--top-k", "12", "--top-p", "0.9", "--min-p", "0", "--temp", "1.3", "--json"],
        "dynamic temperature": ["--dynatemp-range", "0.4", "--dynatemp-exp", "2", "--json"],
        "raw": ["--raw", "--json"],
        "system": ["--system", "You are a pirate."],
        "stop": ["--stop", ".", "--stop", "light", "--json"],
        "text": ["--em-inf", "--em-threshold", "0.5", "--em-steps", "4", "--em-learning-rate", "1.5"],
        "KL": ["--em-inf", "--em-kl-weight", "0.2", "--json"],
        "short context": ["-c", "64", "--max-tokens", "200", "--json"],
        "control text": ["--json", "--system", "<|im_end|> is a token"],
    }.items():
        found.append(Case(f"generate {name}", [*base, *flags]))
    return found


def _chat() -> list[Case]:
    return [
        Case(
            f"chat {engine}",
            [
                "chat",
                "-m",
                SMOLLM2,
                "--backend",
                engine,
                "--seed",
                "5",
                "--max-tokens",
                tokens,
                "--threads",
                "1",
            ],
            stdin=CHAT,
        )
        for engine, tokens in (("llama.cpp", "24"), ("torch", "10"))
    ]


def _batch() -> list[Case]:
    found = []
    for method in METHODS:
        argv = ["batch", "questions.jsonl", "-o", "rows.jsonl", "-m", SMOLLM2, "--method", method]
        argv += ["--parallel", "4", "--ordered", "--max-tokens", "32", "--threads", "1"]
        argv += ["--samples", "3"] if method == "self-consistency" else []
        found.append(Case(f"batch {method}", argv, ("rows.jsonl",)))
    base = ["batch", "questions.jsonl", "-o", "rows.jsonl", "-m", SMOLLM2, "--ordered", "--max-tokens", "24"]
    base += ["--threads", "1"]
    for name, flags in {
        "openai": ["--format", "openai", "--parallel", "2"],
        "keep and samples": ["--keep", "-n", "2", "--parallel", "4", "--em-inf"],
        "own settings": ["--parallel", "1", "--system", "Be brief."],
        "torch": ["--backend", "torch", "--parallel", "4", "--em-inf"],
        "mlx": ["--backend", "mlx", "--parallel", "4", "--em-inf", "--max-tokens", "4"],
    }.items():
        found.append(Case(f"batch {name}", [*base, *flags], ("rows.jsonl",)))
    killed = [*base, "--parallel", "1", "--em-inf"]
    found.append(Case("batch killed and resumed", killed, ("rows.jsonl",), kill_after_rows=("rows.jsonl", 3)))
    return found


def _training() -> list[Case]:
    found = []
    files = ("run/adapter_model.safetensors", "run/metrics.jsonl")
    for recipe in ("default", "paper", "one-shot"):
        argv = [
            "finetune",
            "--data",
            "prompts.jsonl",
            "-o",
            "run",
            "-m",
            SMOLLM2,
            "--recipe",
            recipe,
            *_SMALL_RUN,
        ]
        found.append(Case(f"finetune {recipe}", [*argv, "--rollouts", "torch", "--dtype", "float32"], files))
    argv = ["finetune", "--data", "prompts.jsonl", "-o", "run", "-m", SMOLLM2, *_SMALL_RUN]
    found.append(Case("finetune llama.cpp rollouts", [*argv, "--rollouts", "llama.cpp"], files))
    found.append(Case("finetune mlx", [*argv, "--backend", "mlx", "--max-tokens", "4"], files))
    for recipe in ("grpo", "intuitor", "paper-sequence", "paper-token", "rloo", "ttrl"):
        argv = ["rl", "--data", "labelled.jsonl", "-o", "run", "-m", SMOLLM2, "--recipe", recipe, *_SMALL_RUN]
        argv += ["--samples", "2", "--rollouts", "torch", "--dtype", "float32"]
        found.append(Case(f"rl {recipe}", argv, files))
    return found


def _evaluation() -> list[Case]:
    methods = "greedy,sample:1,em-inf,em-inf:paper,self-consistency:2,em-inf+self-consistency:2,min-p"
    argv = [
        "eval",
        "--task",
        "gsm8k",
        "--data",
        "gsm8k.jsonl",
        "--limit",
        "20",
        "--methods",
        methods,
        "-o",
        "out",
    ]
    argv += ["-m", SMOLLM2, "--parallel", "4", "--max-tokens", "40", "--threads", "1", "-q"]
    return [Case("eval gsm8k", argv, ("out/answers/*.jsonl", "out/results.json"))]


def prepare(folder: Path) -> None:
    """Makes a case's folder, with links to the models and its input files."""
    folder.mkdir(parents=True)
    for model in (SMOLLM2, QWEN):
        (folder / model).symlink_to(MODELS / model)
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:20]]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    questions: list[dict[str, object]] = [
        {"custom_id": f"q{i}", "prompt": r["question"]} for i, r in enumerate(rows[:6])
    ]
    questions += [
        {"prompt": "Say hello.", "temperature": 0, "source": "mine"},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Name a fruit."},
            ]
        },
        {"prompt": "Count to five.", "em_inf": True, "seed": 9, "max_tokens": 12},
        {"prompt": "A bad line", "temperature": -1},
        {"prompt": "Ünïcode: 你好"},
    ]
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8"
    )
    prompts = [{"prompt": row["question"]} for row in rows[:4]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts), encoding="utf-8")
    labelled = [{"prompt": row["question"], "answer": row["answer"].split("#### ")[1]} for row in rows[:4]]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(p) + "\n" for p in labelled), encoding="utf-8")


def run(case: Case, folder: Path, home: Path) -> dict[str, Any]:
    """Runs a case in a new folder. Returns its exit code and the SHA-256 of each output."""
    prepare(folder)
    environment = os.environ | {
        "EMLOCAL_CACHE_DIR": str(home / "cache"),
        "EMLOCAL_CONFIG_DIR": str(home / "config"),
        "EMLOCAL_DATA_DIR": str(home / "data"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }
    command = [sys.executable, "-m", "emlocal", *case.argv]
    if case.kill_after_rows:
        _kill(command, folder, environment, *case.kill_after_rows)
    done = subprocess.run(
        command, cwd=folder, env=environment, input=case.stdin, text=True, capture_output=True, check=False
    )
    (folder / "stderr.txt").write_text(done.stderr, encoding="utf-8")
    outputs = {"stdout": _plain("stdout.json" if "--json" in case.argv else "stdout", done.stdout.encode())}
    for pattern in case.files:
        paths = sorted(folder.glob(pattern))
        outputs |= {str(path.relative_to(folder)): _plain(path.name, path.read_bytes()) for path in paths}
        if not paths:
            outputs[pattern] = b"missing"
    for model in (SMOLLM2, QWEN):
        (folder / model).unlink()
    kept = folder / "compared"
    for name, content in outputs.items():
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).write_bytes(content)
    return {"exit": done.returncode} | {
        name: hashlib.sha256(text).hexdigest() for name, text in outputs.items()
    }


def _kill(command: list[str], folder: Path, environment: dict[str, str], file: str, rows: int) -> None:
    """Starts the command and kills it with SIGKILL once its file has this many lines."""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            path = folder / file
            if path.exists() and path.read_bytes().count(b"\n") >= rows:
                process.send_signal(signal.SIGKILL)
                return
            time.sleep(0.01)


def _plain(name: str, content: bytes) -> bytes:
    """Returns an output without times and versions; JSON gets sorted keys."""
    if name.endswith(".jsonl"):
        return b"".join(_json(line) for line in content.splitlines() if line.strip())
    return _json(content) if name.endswith(".json") and content.strip() else content


def _json(text: bytes) -> bytes:
    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(one) for key, one in value.items() if not LEFT_OUT.search(key)}
        return [kept(one) for one in value] if isinstance(value, list) else value

    return json.dumps(kept(json.loads(text)), sort_keys=True, ensure_ascii=False).encode() + b"\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FOLDER")
    parser.add_argument("--compare", type=Path, metavar="FOLDER")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    chosen = parser.parse_args()
    if (chosen.record is None) == (chosen.compare is None):
        parser.error("give either --record or --compare")
    folder: Path = (chosen.record or chosen.compare).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    file, work = folder / "golden.json", folder / ("record" if chosen.record else "compare")
    golden: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    different = 0
    for case in cases():
        if chosen.only not in case.name:
            continue
        slug = re.sub(r"[^a-z0-9.-]+", "-", case.name.lower())
        shutil.rmtree(work / slug, ignore_errors=True)
        found = run(case, work / slug, folder / "home")
        if chosen.record:
            golden[case.name] = found
            print(f"{case.name}: exit {found['exit']}", flush=True)
            file.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
            continue
        before = golden.get(case.name, {})
        changed = [
            name for name in sorted(before.keys() | found.keys()) if before.get(name) != found.get(name)
        ]
        different += bool(changed)
        print(f"{case.name}: {'DIFFERENT ' + ', '.join(changed) if changed else 'same'}", flush=True)
    if chosen.compare:
        print(f"{different} different")
    return min(different, 1)


if __name__ == "__main__":
    sys.exit(main())
