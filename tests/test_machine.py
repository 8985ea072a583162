"""The number of cores for an engine: control groups as files."""

from pathlib import Path

import pytest

from emlocal import machine as cpu


def write_quota(folder: Path, version: int, quota: int | None, period: int = 100_000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{'max' if quota is None else quota} {period}\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{-1 if quota is None else quota}\n")
        (folder / "cpu.cfs_period_us").write_text(f"{period}\n")


@pytest.mark.parametrize(
    ("version", "line", "mount"),
    [
        (2, "0::/a/b", "."),
        (1, "4:cpu:/a/b", "cpu"),
        (1, "4:cpu,cpuacct:/a/b", "cpu,cpuacct"),
        (1, "4:cpu,cpuacct:/a/b", "cpu"),  # where one does not link to the other
        (1, "4:cpuacct,cpu:/a/b", "cpuacct,cpu"),
    ],
)
def test_the_smallest_quota_counts(tmp_path: Path, version: int, line: str, mount: str) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text(f"9:memory:/elsewhere\n{line}\n3:cpuset:/a\n")
    assert cpu._cgroup_quota(root, own) is None
    write_quota(root / mount / "a" / "b", version, None)
    assert cpu._cgroup_quota(root, own) is None
    write_quota(root / mount / "a", version, 350_000)
    assert cpu._cgroup_quota(root, own) == 3  # half a core is not enough for a thread
    write_quota(root / mount, version, 50_000, 25_000)
    assert cpu._cgroup_quota(root, own) == 2
    write_quota(root / mount / "a" / "b", version, 10_000)
    assert cpu._cgroup_quota(root, own) == 1  # but at least one


def test_in_a_container_the_path_may_be_the_hosts(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("4:cpu,cpuacct:/docker/3f2a\n0::/\n")
    write_quota(root / "cpu,cpuacct", 1, 200_000)
    assert cpu._cgroup_quota(root, own) == 2


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu._cgroup_quota(tmp_path, tmp_path / "nothing") is None


def test_there_are_cores_here() -> None:
    assert 1 <= cpu.physical_cores() <= 4096
