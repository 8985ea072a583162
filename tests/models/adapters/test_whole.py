"""A reader sees a whole adapter or none, even when the writer is killed."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emlocal.errors import EmlocalError, ModelError, UsageError
from emlocal.models.adapters import read_adapter
from emlocal.models.adapters.folders import write_mlx, write_peft
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.gguf import read_header
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_pair import assert_same, random_adapter

WRITE_FOREVER = """
import sys
from pathlib import Path
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.adapters.folders import write_peft
from emlocal.models.gguf import read_header
from tests.tiny_pair import random_adapter
folder = Path(sys.argv[1])
adapters = [random_adapter(layers=1, rank=64, scale=s, seed=s) for s in (1, 2)]
base = read_header(folder / "tiny.gguf")
print("ready", flush=True)
for i in range(100_000):
    write_peft(adapters[i % 2], folder / f"peft-{i % 8}", replace=True)
    write_gguf(adapters[i % 2], folder / f"{i % 8}.gguf", base)
"""


def test_kill_9_leaves_whole_adapters(tmp_path: Path) -> None:
    """Replaces eight folders and files in turn and kills the writer at a random moment, four times."""
    base = read_header(write_tiny_gguf(tmp_path / "tiny.gguf"))
    wanted = [random_adapter(layers=1, rank=64, scale=s, seed=s) for s in (1, 2)]
    rng, seen, complaints = random.Random(0), 0, set()
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while not (tmp_path / "peft-1").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        # while it writes: no mixture, and nothing half written
        for _ in range(20):
            try:
                found = read_adapter(tmp_path / "peft-0")
            except ModelError as error:  # in the moment between the old folder and the new one
                complaints.add(error.message)
            else:
                assert_same(found, wanted[int(found.pairs["model.layers.0.mlp.up_proj"].scale) - 1])
        writer.kill()
        writer.wait()
        writer.stdout.close()
        for path in (*tmp_path.glob("peft-?"), *tmp_path.glob("?.gguf")):
            found = read_adapter(path, base)
            assert_same(found, wanted[int(found.pairs["model.layers.0.mlp.up_proj"].scale) - 1])
            seen += 1
    assert seen > 8
    assert all("there is no adapter" in c or "cannot read" in c for c in complaints)


def test_replacing(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_peft(random_adapter(seed=1), folder)
    with pytest.raises(EmlocalError, match="exists already"):
        write_peft(random_adapter(seed=2), folder)
    assert_same(read_adapter(folder), random_adapter(seed=1))
    write_mlx(random_adapter(seed=2), folder, replace=True)
    assert_same(read_adapter(folder), random_adapter(seed=2))
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_with_other_things_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"other files than an adapter's \(thesis.tex\)"):
        write_peft(random_adapter(), folder, replace=True)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    base = read_header(write_tiny_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(ModelError, match=r"layers\.1"):
        write_gguf(random_adapter(layers=2), tmp_path / "a.gguf", base)
    (tmp_path / "file").write_text("")
    with pytest.raises(EmlocalError, match="cannot write"):
        write_peft(random_adapter(), tmp_path / "file" / "a")
    with pytest.raises(EmlocalError, match="cannot write"):
        write_gguf(random_adapter(layers=1), tmp_path / "none" / "a.gguf", base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "tiny.gguf"]


@pytest.mark.parametrize("limit", [100, 3000, 20_000, 60_000, -1])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, limit: int) -> None:
    """A limit on file sizes produces the same system error as a full disk."""
    import resource

    base = read_header(write_tiny_gguf(tmp_path / "tiny.gguf"))
    old, new = (random_adapter(layers=1, rank=64, seed=s) for s in (1, 2))
    write_peft(old, tmp_path / "peft")
    write_mlx(old, tmp_path / "mlx")
    write_gguf(old, tmp_path / "a.gguf", base)
    names = sorted(p.name for p in tmp_path.iterdir())
    sizes = [p.stat().st_size for p in (tmp_path / "a.gguf", *tmp_path.glob("*/*.safetensors"))]
    assert min(sizes) > 60_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit > 0 else min(sizes) - 1, before[1]))
    try:
        with pytest.raises(EmlocalError, match=r"cannot write .*peft: .*File too large"):
            write_peft(new, tmp_path / "peft", replace=True)
        with pytest.raises(EmlocalError, match=r"cannot write .*mlx: .*File too large"):
            write_mlx(new, tmp_path / "mlx", replace=True)
        with pytest.raises(
            EmlocalError,
            match=r"cannot write .*a\.gguf: (File too large|\d+ requested|[\d,]+ of [\d,]+ bytes)",
        ):
            write_gguf(new, tmp_path / "a.gguf", base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    for name in ("peft", "mlx"):
        assert_same(read_adapter(tmp_path / name), old, exactly=False)
    assert_same(read_adapter(tmp_path / "a.gguf", base), old, exactly=False)
