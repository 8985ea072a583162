"""How many threads a CPU engine should use: the physical cores that this process may run on.

Decoding is bound by memory bandwidth; a second thread on a core only adds contention.
"""

import os
import subprocess
import sys
from pathlib import Path


def physical_cores() -> int:
    """Physical (on Apple Silicon: performance) cores, within the process's affinity and cgroup quota."""
    if sys.platform == "darwin":
        cores = _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or (os.cpu_count() or 1)
    elif sys.platform == "linux":
        cores = _linux_cores()
    else:
        cores = (os.cpu_count() or 2) // 2
    return max(1, cores)


def _linux_cores() -> int:
    usable = os.sched_getaffinity(0)
    siblings = set()
    for cpu in usable:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(topology.read_text().strip() if topology.exists() else str(cpu))
    return min(len(siblings), _cgroup_quota() or len(siblings))


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Whole CPUs that the control groups of this process grant (a container's --cpus), or None for all.

    Version 1 mounts controllers in folders of their own, version 2 all in one; both may be there.
    """
    quotas = []
    for line in own.read_text("ascii").splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in {root / controllers, root / "cpu"} if controllers else (root,):
            group = top / path.lstrip("/")
            # Inside a container the path may be the host's; then the quota is at the top.
            for folder in (group, *(p for p in group.parents if p.is_relative_to(top))):
                quotas.append(_version_1(folder) if controllers else _version_2(folder))
    granted = [quota for quota in quotas if quota is not None]
    return max(1, int(min(granted))) if granted else None


def _version_1(folder: Path) -> float | None:
    """CPUs that one group of cgroup v1 grants."""
    quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
    if not quota.is_file() or not period.is_file() or int(quota.read_text("ascii")) < 0:
        return None
    return int(quota.read_text("ascii")) / int(period.read_text("ascii"))


def _version_2(folder: Path) -> float | None:
    """CPUs that one group of cgroup v2 grants."""
    limit = folder / "cpu.max"
    if not limit.is_file():
        return None
    quota, period = limit.read_text("ascii").split()
    return None if quota == "max" else int(quota) / int(period)


def _sysctl(name: str) -> int:
    answer = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return int(answer.stdout) if answer.returncode == 0 else 0


def peak_memory() -> int:
    """Bytes: the most that this process had in main memory at once; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
