"""generate, chat and batch on the mlx engine: model folders, GGUF files, adapters."""

import json
from collections.abc import Callable
from pathlib import Path

from emlocal.models.adapters.folders import write_peft
from tests.cli.conftest import Outcome
from tests.tiny_pair import random_adapter

Emlocal = Callable[..., Outcome]
SHORT = ("--max-tokens", "12", "--seed", "7")
MLX = ("--backend", "mlx")


def test_a_folder_and_a_gguf_file_of_the_same_weights_say_the_same(
    emlocal: Emlocal, unpacked_tiny: Path, tiny: str
) -> None:
    for more in (("--em-inf",), ("--temp", "0"), ("--adaptive-temp", "--repeat-penalty", "1.2")):
        said = emlocal("generate", "-m", str(unpacked_tiny), *MLX, *SHORT, *more, "hello")
        assert said.code == 0, said.err
        assert "on mlx, asked for; context 256 tokens, " in said.err
        assert emlocal("generate", "-m", tiny, *MLX, *SHORT, *more, "hello").out == said.out != "\n"


def test_adapters(emlocal: Emlocal, tiny: str, tmp_path: Path) -> None:
    write_peft(random_adapter(layers=1), tmp_path / "good")
    write_peft(random_adapter(layers=2), tmp_path / "wrong")
    common = ("generate", "-m", tiny, *MLX, "--temp", "0", *SHORT, "hello")
    with_it = emlocal(*common, "--adapter", str(tmp_path / "good"))
    assert ", 1 adapter" in with_it.err
    assert with_it.out != emlocal(*common).out
    wrong = emlocal(*common, "--adapter", str(tmp_path / "wrong"))
    assert (wrong.code, wrong.out) == (1, "")
    assert "tiny.gguf does not have" in wrong.err
    assert "Traceback" not in wrong.err


def test_a_turn_of_chat_and_taking_it_back(emlocal: Emlocal, tiny: str) -> None:
    chat = ("chat", "-m", tiny, *MLX, "--em-inf", *SHORT)
    first = emlocal(*chat, stdin="hello\n").out
    both = emlocal(*chat, stdin="hello\n/undo\nhello you\n")
    assert both.code == 0
    assert "removed: hello" in both.err
    assert both.out.startswith(first)
    assert len(both.out) > len(first) > 1


def test_batch(emlocal: Emlocal, tiny: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows = [json.dumps({"custom_id": f"q{i}", "prompt": "a" * (i + 1)}) for i in range(7)]
    source.write_text("\n".join(rows) + "\n")

    def texts(*flags: str) -> list[str]:
        done = emlocal("batch", "-m", tiny, *flags, *SHORT, "--em-inf", "--ordered", "-q", str(source))
        assert done.code == 0, done.err
        return [json.loads(line)["text"] for line in done.out.splitlines()]

    together = texts(*MLX, "--parallel", "4")
    assert len(set(together)) > 4
    assert texts(*MLX, "--parallel", "1") == together
