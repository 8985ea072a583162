"""`emlocal doctor` on this machine, and on deliberately broken ones."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from emlocal import diagnosis as checks
from emlocal import machine
from emlocal.backends import llama_cpp, mlx
from emlocal.cli.app import build
from emlocal.models import starter
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"EMLOCAL_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(build(["doctor"]), ["doctor", *arguments])


def examined() -> tuple[int, dict[str, Any]]:
    """Returns the exit code and the output of --json."""
    result = run("--json")
    return result.exit_code, json.loads(result.stdout)


def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, body: str) -> None:
    """Puts a fake module before the real one, for the processes that the doctor starts."""
    folder = tmp_path / "shadow"
    folder.mkdir()
    (folder / f"{module}.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_machine_that_works() -> None:
    code, said = examined()
    assert (code, said["ok"]) == (0, True)
    assert set(said["checks"]) >= {
        *(
            "system",
            "processor",
            "memory",
            "python",
            "numpy",
            "sampler",
            "llama.cpp",
            "mlx",
            "torch",
            "compiler",
        ),
        *("cache", "data", "hub cache", "model", "config"),
    }
    assert all({"status", "text", "fix"} <= set(check) for check in said["checks"].values())
    engine = said["checks"]["llama.cpp"]
    assert engine["status"] == "ok"
    assert engine["version"].startswith("0.3.")
    assert said["checks"]["processor"]["physical"] >= 1
    assert said["checks"]["memory"]["free_bytes"] > 0
    assert "installed" in said["checks"]["mlx"]
    assert "installed" in said["checks"]["torch"]


def test_which_build_of_llama_cpp_it_is() -> None:
    gpu = examined()[1]["checks"]["gpu"]
    if gpu["built_for"]:
        pytest.skip("this build has a GPU")
    assert gpu["status"] == "info"
    assert gpu["text"].startswith("llama.cpp is built for CPUs only")
    assert gpu["gpus"] == []
    assert len(gpu["fix"]) == (1 if sys.platform == "darwin" else 3)


@pytest.mark.parametrize(("system", "tags"), [("linux", ["cu130", "cu125", "vulkan"]), ("darwin", ["metal"])])
def test_wheels_for_gpus(system: str, tags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    lines = llama_cpp.gpu_install_lines()
    assert [line.rpartition("/")[2] for line in lines] == tags
    assert all("--only-binary llama-cpp-python" in line for line in lines)


@pytest.mark.parametrize(
    ("listing", "status", "text"),
    [
        (
            {"built_for": ["cuda"], "gpus": []},
            "info",
            "llama.cpp is built for CUDA, but finds no GPU; models run on the CPU",
        ),
        (
            {
                "built_for": ["vulkan"],
                "gpus": [{"name": "Vulkan0", "description": "RX", "free": 10**10, "total": 12 * 10**9}],
            },
            "ok",
            "llama.cpp is built for Vulkan; Vulkan0 (RX): 10.0 GB free of 12.0 GB",
        ),
    ],
)
def test_builds_for_gpus(
    listing: dict[str, Any], status: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "probe", lambda module, info: {"info": json.dumps(listing)})
    (found,) = checks.gpu()
    assert (found.status, found.text, found.fix) == (status, text, ())


def test_lines_for_people_end_with_the_verdict() -> None:
    result = run()
    assert result.exit_code == 0
    assert "llama-cpp-python" in result.stdout
    assert result.stdout.rstrip().splitlines()[-1].startswith("chat works here")
    assert "\x1b" not in result.stdout


def test_looking_changes_nothing(tmp_path: Path) -> None:
    run()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes mlx the engine of this machine, whatever it is."""
    monkeypatch.setattr(mlx, "on_apple_silicon", lambda: True)


def test_mlx_is_tried_where_it_is_the_engine(apple: None, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = examined()
    engine = said["checks"]["mlx"]
    assert (code, engine["status"]) == (0, "ok")
    assert engine["text"].startswith("mlx-lm 0.32.")
    assert "Device(" in engine["text"]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find_spec(name)
    )
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: nothing(name))
    code, said = examined()
    assert (code, said["checks"]["llama.cpp"]["status"]) == (0, "info")
    assert said["checks"]["llama.cpp"]["text"] == "not installed: pip install 'emlocal[llama-cpp]'"


def nothing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_mlx_that_cannot_be_loaded(apple: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow(tmp_path, monkeypatch, "mlx_lm", "raise ImportError('libmlx.dylib: no such file')")
    code, said = examined()
    assert (code, said["checks"]["mlx"]["status"]) == (1, "fail")
    assert "libmlx.dylib" in said["checks"]["mlx"]["text"]
    assert "--force-reinstall mlx mlx-lm" in said["checks"]["mlx"]["fix"][0]


def test_llama_cpp_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "raise ModuleNotFoundError(\"No module named 'llama_cpp'\", name='llama_cpp')"
    shadow(tmp_path, monkeypatch, "llama_cpp", body)
    monkeypatch.setattr(machine, "compilers", lambda: [])
    code, said = examined()
    engine = said["checks"]["llama.cpp"]
    assert (code, said["ok"], engine["status"]) == (1, False, "fail")
    assert "No module named 'llama_cpp'" in engine["text"]
    fixes = "\n".join(engine["fix"])
    assert all(line in fixes for line in machine.compiler_lines())
    assert llama_cpp.REQUIREMENT in fixes
    assert f"--extra-index-url {llama_cpp.WHEEL_INDEX}" in fixes
    assert "chat does not work here yet: see llama.cpp" in run().stdout


@pytest.mark.parametrize(
    ("body", "says", "mend"),
    [
        ("raise OSError('libllama.so: cannot open shared object file')", "libllama.so", "--no-binary"),
        ("raise AttributeError('undefined symbol: llama_decode')", "undefined symbol", "--no-binary"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "another processor", "--no-binary"),
        ("import os; print('noise'); os._exit(3)", "exit code 3", "--no-binary"),
        ("import sys; sys.exit('no')", "SystemExit", "--no-binary"),
    ],
)
def test_llama_cpp_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str, mend: str
) -> None:
    shadow(tmp_path, monkeypatch, "llama_cpp", body)
    code, said = examined()
    engine = said["checks"]["llama.cpp"]
    assert (code, engine["status"]) == (1, "fail")
    assert says in engine["text"]
    assert mend in engine["fix"][-1]


def test_an_openmp_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow(tmp_path, monkeypatch, "llama_cpp", "raise OSError('libgomp.so.1: cannot open shared object')")
    monkeypatch.setattr(machine, "system_family", lambda: "Debian, Ubuntu")
    assert examined()[1]["checks"]["llama.cpp"]["fix"] == ["sudo apt-get install libgomp1"]


def fake_llama(version: str, info: str) -> str:
    return f"__version__ = {version!r}\ndef llama_print_system_info(): return {info.encode()!r}\n"


@pytest.mark.parametrize("version", ["0.2.90", "0.3.35", "0.4.0"])
def test_bindings_of_another_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    shadow(tmp_path, monkeypatch, "llama_cpp", fake_llama(version, "CPU : AVX = 1 | "))
    code, said = examined()
    assert code == 1
    assert version in said["checks"]["llama.cpp"]["text"]


def test_a_build_that_leaves_the_processor_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow(tmp_path, monkeypatch, "llama_cpp", fake_llama("0.3.40", "CPU : SSE3 = 1 | AVX = 0 | "))
    cpu = machine.CPU("A processor", "x86_64", 2, 2, 2, ("AVX", "AVX2"))
    monkeypatch.setattr(machine, "cpu", lambda: cpu)
    code, said = examined()
    engine = said["checks"]["llama.cpp"]
    assert (code, engine["status"]) == (0, "warn")
    assert "without AVX and AVX2" in engine["text"]
    assert "--no-binary llama-cpp-python" in engine["fix"][0]


def test_numpy_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow(tmp_path, monkeypatch, "numpy", "raise ImportError('the C-extensions failed')")
    code, said = examined()
    assert code == 1
    assert "the C-extensions failed" in said["checks"]["numpy"]["text"]


def test_the_whole_program_without_numpy_and_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor itself must not need the packages that it checks."""
    shadow(tmp_path, monkeypatch, "numpy", "raise ImportError('the C-extensions failed')")
    (tmp_path / "shadow" / "llama_cpp.py").write_text("raise OSError('gone')")
    path = os.pathsep.join([str(tmp_path / "shadow"), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "emlocal", "doctor", "--json"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert checks["numpy"]["status"] == checks["llama.cpp"]["status"] == "fail"
    assert checks["system"]["status"] == "info"


def test_an_import_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow(tmp_path, monkeypatch, "llama_cpp", "import time; time.sleep(60)")
    monkeypatch.setattr(checks, "PROBE_SECONDS", 0.5)
    assert "more than 0.5 seconds" in examined()[1]["checks"]["llama.cpp"]["text"]


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")  # read-only even for root, unlike permissions
    monkeypatch.setenv("EMLOCAL_CACHE_DIR", str(blocked / "cache"))
    code, said = examined()
    assert code == 1  # there is no model here, and none can be fetched
    assert said["checks"]["cache"]["writable"] is False
    assert "EMLOCAL_CACHE_DIR" in said["checks"]["cache"]["fix"][0]
    assert "cannot be fetched" in said["checks"]["model"]["text"]


def test_a_file_system_that_takes_no_files() -> None:
    assert checks.unwritable(Path("/proc/emlocal")) is not None


def test_the_model_is_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_gguf(starter.starter_path())
    monkeypatch.setattr(starter, "FILE_BYTES", path.stat().st_size)
    model = examined()[1]["checks"]["model"]
    assert (model["status"], model["on_disk"], model["path"]) == ("ok", True, str(path))


def test_a_model_file_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    path = starter.starter_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF nonsense")
    monkeypatch.setattr(starter, "FILE_BYTES", path.stat().st_size)
    code, said = examined()
    assert (code, said["checks"]["model"]["status"]) == (1, "fail")


@pytest.mark.parametrize("text", ["temp = ", "temprature = 1", "temp = -5", "top-k = 'many'"])
def test_a_config_file_with_a_mistake(tmp_path: Path, text: str) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text(text)
    code, said = examined()
    assert (code, said["checks"]["config"]["status"]) == (1, "fail")


def test_a_config_file_that_is_fine(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text("temp = 0.5\n")
    config = examined()[1]["checks"]["config"]
    assert (config["status"], config["exists"]) == ("ok", True)


def test_tokens_and_other_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("--json")
    assert "hf_verysecret" not in result.stdout
    assert json.loads(result.stdout)["checks"]["variables"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("release", "family"),
    [
        ({"ID": "debian"}, "Debian, Ubuntu"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "Debian, Ubuntu"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "Fedora, RHEL"),
        ({"ID": "alpine"}, "Alpine"),
        ({"ID": "manjaro", "ID_LIKE": "arch"}, "Arch"),
        ({"ID": "nixos"}, None),
    ],
)
def test_which_packages_a_system_has(
    monkeypatch: pytest.MonkeyPatch, release: dict[str, str], family: str | None
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)
    assert machine.system_family() == family
    assert len(machine.compiler_lines()) == (1 if family else 6)
