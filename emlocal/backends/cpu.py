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


def _cgroup_quota() -> int | None:
    """Whole CPUs that cgroup v2 grants (a container's --cpus), or None."""
    limit = Path("/sys/fs/cgroup/cpu.max")
    if not limit.exists():
        return None
    quota, period = limit.read_text().split()
    return None if quota == "max" else max(1, int(quota) // int(period))


def _sysctl(name: str) -> int:
    answer = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return int(answer.stdout) if answer.returncode == 0 else 0
