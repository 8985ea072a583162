"""Ownership of outputs: manifests, settings, and files that are never overwritten unasked."""

import json
from pathlib import Path

import pytest

from emlocal.batch.output import manifest_path
from emlocal.errors import UsageError
from tests.batch.test_journal import refused
from tests.batch.writer import SETTINGS, opened, row, run


def test_a_file_without_a_manifest_is_left_alone(output: Path) -> None:
    output.write_text("precious\n")
    with refused(UsageError, "exists and is not an output of emlocal", "-o", "--restart"):
        opened(output)
    assert output.read_text() == "precious\n"
    assert not manifest_path(output).exists()


@pytest.mark.parametrize("manifest", [b"", b"\0" * 100, b'{"format": "emlocal-batch-1", "sett'])
def test_a_crash_before_the_manifest_was_written_is_a_new_run(output: Path, manifest: bytes) -> None:
    manifest_path(output).write_bytes(manifest)
    run(output, 2)
    output.write_text("{}\n")
    manifest_path(output).write_bytes(manifest)
    with refused(UsageError, "is not an output of emlocal"):
        opened(output)
    output.write_text("")
    run(output, 2)
    with opened(output) as journal:
        assert journal.rows == 2


@pytest.mark.parametrize("content", ["my notes\n", '{"format": "emlocal-batch-2", "settings": {}}\n', "{}"])
def test_a_foreign_file_in_the_manifests_place_is_left_alone(output: Path, content: str) -> None:
    manifest_path(output).write_text(content)
    output.write_text("precious\n")
    with refused(UsageError, "out.jsonl.run exists and was not written by this emlocal"):
        opened(output, restart=True)
    assert manifest_path(output).read_text() == content
    assert output.read_text() == "precious\n"


def test_the_manifest_is_one_line_of_json_after_a_run(output: Path) -> None:
    run(output, 2)
    content = manifest_path(output).read_text()
    assert json.loads(content) == {"format": "emlocal-batch-1", "settings": SETTINGS}
    run(output, 4)
    assert manifest_path(output).read_text() == content


def test_other_settings_are_refused_with_what_differs(output: Path) -> None:
    old = {"model": "a.gguf", "em": {"threshold": 0.3, "steps": 10}, "top_k": 40, "stop": ["x"], "seed": 1}
    new = {"model": "b.gguf", "em": {"threshold": 0.5, "steps": 10}, "stop": ["x", "ü"], "seed": True}
    with opened(output, old) as journal:
        journal.append(row(0))
    listed = (
        'model: "a.gguf" -> "b.gguf"; em.threshold: 0.3 -> 0.5; stop: ["x"] -> ["x", "ü"]; '
        "seed: 1 -> true; top_k: 40 -> not set"
    )
    with refused(UsageError, f"was started with other settings: {listed} | ", "-o", "--restart"):
        opened(output, new)
    opened(output, dict(reversed(old.items()))).close()


def test_of_long_settings_the_part_that_differs_is_shown(output: Path) -> None:
    with opened(output, {"system": "You are kind. " * 99 + "Say yes." + " Please." * 99}) as journal:
        journal.append(row(0))
    with pytest.raises(UsageError) as caught:
        opened(output, {"system": "You are kind. " * 99 + "Say no." + " Please." * 99})
    assert "Say yes." in caught.value.message
    assert "Say no." in caught.value.message
    assert len(caught.value.message) < 300


def test_a_whole_number_is_the_same_setting_with_and_without_a_point(output: Path) -> None:
    with opened(output, {"temperature": 1}) as journal:
        journal.append(row(0))
    opened(output, {"temperature": 1.0}).close()


def test_an_output_without_rows_takes_new_settings(output: Path) -> None:
    opened(output, {"seed": 1}).close()
    with opened(output, {"seed": 2}) as journal:
        journal.append(row(0))
    with refused(UsageError, "seed: 2 -> 1"):
        opened(output, {"seed": 1})


def test_restart_overwrites_whatever_there_is(output: Path) -> None:
    output.write_text("precious\n")
    run(output, 2, restart=True)
    with opened(output, {"seed": 2}, restart=True) as journal:
        assert journal.rows == 0
        assert output.read_bytes() == b""
        journal.append(row(7))
    with opened(output, {"seed": 2}) as journal:
        assert "row-7" in journal.done
        assert journal.rows == 1
