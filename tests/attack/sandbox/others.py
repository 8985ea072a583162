"""Attacks on other processes: their memory, state and resources, and signals to them."""

import ctypes
import os
import resource
import signal
import time

from tests.attack.sandbox.prelude import VICTIM, attack, call, own_file, proven

PID = int(VICTIM.get("pid", 0))


@proven
def kill() -> None:
    os.kill(PID, 0)


@attack
def kill_the_parent() -> None:
    os.kill(os.getppid(), signal.SIGCONT)


@attack
def kill_all() -> None:
    os.kill(-1, 0)


@proven
def kill_a_group() -> None:
    os.killpg(os.getpgid(0), 0)


@proven
def tkill() -> None:
    call("tkill", PID, 0)


@proven
def tgkill() -> None:
    call("tgkill", PID, PID, 0)


@attack
def rt_sigqueueinfo() -> None:
    call("rt_sigqueueinfo", PID, 0, ctypes.create_string_buffer(128))


@attack
def rt_tgsigqueueinfo() -> None:
    call("rt_tgsigqueueinfo", PID, PID, 0, ctypes.create_string_buffer(128))


@proven
def pidfd_open() -> None:
    call("pidfd_open", PID, 0)


@attack
def pidfd_send_signal() -> None:
    call("pidfd_send_signal", own_file(), 0, 0, 0)


@attack
def pidfd_getfd() -> None:
    call("pidfd_getfd", own_file(), 0, 0)


@attack
def process_madvise() -> None:
    call("process_madvise", own_file(), 0, 0, 20, 0)


@attack
def process_mrelease() -> None:
    call("process_mrelease", own_file(), 0)


@attack
def ptrace_attach() -> None:
    call("ptrace", 16, PID, 0, 0)


@attack
def ptrace_seize() -> None:
    call("ptrace", 0x4206, PID, 0, 0)


@attack
def be_traced_by_the_parent() -> None:
    call("ptrace", 0, 0, 0, 0)


def _vector(address: int, length: int) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * 2)(address, length)


@attack
def process_vm_readv() -> None:
    into = ctypes.create_string_buffer(16)
    call(
        "process_vm_readv", PID, _vector(ctypes.addressof(into), 16), 1, _vector(VICTIM["address"], 16), 1, 0
    )


@proven
def process_vm_readv_of_itself() -> None:
    into, what = ctypes.create_string_buffer(16), ctypes.create_string_buffer(b"x" * 16)
    here, there = (_vector(ctypes.addressof(buffer), 16) for buffer in (into, what))
    call("process_vm_readv", os.getpid(), here, 1, there, 1, 0)


@attack
def process_vm_writev() -> None:
    what = ctypes.create_string_buffer(b"OWNED!")
    call("process_vm_writev", PID, _vector(ctypes.addressof(what), 6), 1, _vector(VICTIM["address"], 6), 1, 0)


@proven
def kcmp() -> None:
    call("kcmp", os.getpid(), os.getpid(), 1, 0, 0)


@attack
def memory_by_proc() -> None:
    with open(f"/proc/{PID}/mem", "rb") as file:
        file.seek(VICTIM["address"])
        file.read(16)


@proven
def environment_by_proc() -> None:
    with open(f"/proc/{PID}/environ", "rb") as file:
        assert b"VICTIM_SECRET" in file.read()


@proven
def command_line_by_proc() -> None:
    with open(f"/proc/{PID}/cmdline", "rb") as file:
        file.read()


@proven
def maps_by_proc() -> None:
    with open(f"/proc/{PID}/maps", "rb") as file:
        file.read()


@proven
def descriptors_by_proc() -> None:
    os.listdir(f"/proc/{PID}/fd")


@proven
def where_it_stands_by_proc() -> None:
    os.readlink(f"/proc/{PID}/cwd")


@proven
def its_program_by_proc() -> None:
    os.readlink(f"/proc/{PID}/exe")


@proven
def its_root_by_proc() -> None:
    os.chdir(f"/proc/{PID}/root")


@proven
def its_open_file_by_proc() -> None:
    os.stat(f"/proc/{PID}/fd/0")


@attack
def its_stack_by_proc() -> None:
    with open(f"/proc/{PID}/stack", "rb") as file:
        file.read()


@proven
def list_all_processes() -> None:
    os.listdir("/proc")


@proven
def own_environment_by_proc() -> None:
    with open("/proc/self/environ", "rb") as file:
        file.read()


@proven
def own_maps_by_proc() -> None:
    with open("/proc/self/maps", "rb") as file:
        file.read()


@proven
def own_memory_by_proc() -> None:
    os.open("/proc/self/mem", os.O_RDWR)


@attack
def the_kernels_settings() -> None:
    os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY)


@attack
def a_better_victim_for_the_killer() -> None:
    os.open(f"/proc/{PID}/oom_score_adj", os.O_WRONLY)


@proven
def limits_of_others() -> None:
    resource.prlimit(PID, resource.RLIMIT_NOFILE)


@attack
def change_limits_of_others() -> None:
    resource.prlimit(PID, resource.RLIMIT_NOFILE, (1, 1))


@proven
def priority_of_others() -> None:
    os.setpriority(os.PRIO_PROCESS, PID, os.getpriority(os.PRIO_PROCESS, PID))


@proven
def see_priority_of_others() -> None:
    os.getpriority(os.PRIO_PROCESS, PID)


@proven
def own_priority() -> None:
    os.nice(1)


@proven
def disk_priority_of_others() -> None:
    call("ioprio_get", 1, PID)


@proven
def disk_priority() -> None:
    call("ioprio_set", 1, 0, (2 << 13) | 7)


@proven
def other_processors() -> None:
    os.sched_setaffinity(0, os.sched_getaffinity(0))


@proven
def processors_of_others() -> None:
    os.sched_getaffinity(PID)


@proven
def scheduling_of_others() -> None:
    os.sched_getscheduler(PID)


@proven
def another_scheduling() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@attack
def real_time() -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))


@proven
def scheduling_parameters() -> None:
    os.sched_getparam(PID)


@proven
def deadlines() -> None:
    call("sched_getattr", PID, ctypes.create_string_buffer(56), 56, 0)


@proven
def time_slices_of_others() -> None:
    os.sched_rr_get_interval(PID)


@proven
def group_of_others() -> None:
    os.getpgid(PID)


@proven
def session_of_others() -> None:
    os.getsid(PID)


@attack
def locks_of_others() -> None:
    call("get_robust_list", PID, ctypes.create_string_buffer(8), ctypes.create_string_buffer(8))


@proven
def processor_time_of_others() -> None:
    time.clock_gettime((~PID << 3) | 2)


@proven
def resolution_of_anothers_clock() -> None:
    call("clock_getres", (~PID << 3) | 2, 0)


@attack
def sleep_by_anothers_clock() -> None:
    call("clock_nanosleep", (~PID << 3) | 2, 0, (ctypes.c_uint64 * 2)(0, 1), 0)


@proven
def a_timer_of_the_kernel() -> None:
    call("timer_create", 1, 0, ctypes.create_string_buffer(8))


@attack
def migrate_pages() -> None:
    call("migrate_pages", PID, 0, 0, 0)


@attack
def move_pages() -> None:
    call("move_pages", PID, 0, 0, 0, 0, 0)


@attack
def measure_others() -> None:
    attributes = (ctypes.c_uint32 * 32)(1, 128)
    call("perf_event_open", attributes, PID, -1, -1, 0)


@attack
def signals_of_a_pipes_owner() -> None:
    reading, _ = os.pipe()
    call("fcntl", reading, 8, PID)


@attack
def signals_of_a_pipes_owner_by_ioctl() -> None:
    reading, _ = os.pipe()
    call("ioctl", reading, 0x8901, (ctypes.c_int * 1)(PID))


@proven
def signals_when_a_pipe_is_ready() -> None:
    reading, _ = os.pipe()
    call("fcntl", reading, 4, 0x2000)


@proven
def signals_when_a_pipe_is_ready_by_ioctl() -> None:
    reading, _ = os.pipe()
    call("ioctl", reading, 0x5452, (ctypes.c_int * 1)(1))
