"""Makes the pictures of docs/tour.md: runs emlocal in a real terminal (tmux) and saves its screen as SVG.

python docs/captures.py [MODEL]        (needs tmux; MODEL defaults to the starter model)
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 100, 40
SESSION = "emlocal-captures"
PROMPT = "$ "


def tmux(*arguments: str) -> str:
    done = subprocess.run(["tmux", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def screen() -> str:
    return tmux("capture-pane", "-t", SESSION, "-p", "-e", "-S", "-")


def type_line(text: str, until: str, patience: float = 60) -> None:
    """Types a line and waits until the screen shows `until` once more than before."""
    before = screen().count(until)
    tmux("send-keys", "-t", SESSION, "-l", text)
    tmux("send-keys", "-t", SESSION, "Enter")
    deadline = time.monotonic() + patience
    while screen().count(until) <= before:
        if time.monotonic() > deadline:
            raise SystemExit(f"{text!r} did not show {until!r}:\n{screen()}")
        time.sleep(0.2)
    time.sleep(0.5)


def save(name: str, title: str) -> None:
    """Saves the screen without its empty end as SVG."""
    lines = screen().rstrip().splitlines()
    while lines and (not lines[-1].strip() or lines[-1].strip() == PROMPT.strip()):
        lines.pop()
    console = Console(record=True, width=WIDTH, file=Path("/dev/null").open("w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi("\n".join(lines)))
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / f"{name}.svg").write_text(console.export_svg(title=title), encoding="utf-8")
    print(IMAGES / f"{name}.svg")


def fresh() -> None:
    """Opens a new terminal with `emlocal` on its path."""
    subprocess.run(["tmux", "kill-session", "-t", SESSION], capture_output=True, check=False)
    time.sleep(1)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = f"env PS1='{PROMPT}' PATH='{path}' bash --norc --noprofile"
    tmux("new-session", "-d", "-s", SESSION, "-x", str(WIDTH), "-y", str(HEIGHT), shell)
    time.sleep(1)


def main() -> None:
    model = f" -m {sys.argv[1]}" if len(sys.argv) > 1 else ""

    fresh()
    type_line(f"emlocal chat --em-inf --seed 3{model}", ">>>")
    type_line("Why is the sky blue? One sentence.", "seed 3")
    type_line("/compare", "they differ")
    save("chat", "emlocal chat: /compare")
    type_line("/entropy", "tokens with the highest entropy")
    save("entropy", "emlocal chat: /entropy")

    fresh()
    type_line(f"emlocal generate --em-inf --show-entropy --seed 1 'Tell me about rain.'{model}", "nats (EM")
    save("show-entropy", "emlocal generate --show-entropy")

    fresh()
    type_line("emlocal models list", "qwen3:8b")
    save("models-list", "emlocal models list")
    tmux("kill-session", "-t", SESSION)


if __name__ == "__main__":
    main()
