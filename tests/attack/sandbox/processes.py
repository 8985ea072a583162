"""Attacks: more processes and programs, privileges, and the settings that contain a program."""

import concurrent.futures
import ctypes
import multiprocessing
import os
import resource
import subprocess
import threading

from tests.attack.sandbox.prelude import attack, call, control, own_file, proven


def _child_of(pid: int) -> None:
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


@proven
def fork() -> None:
    _child_of(os.fork())


@proven
def clone_as_fork() -> None:
    _child_of(call("clone", 17, 0, 0, 0, 0))


@proven
def clone3_as_fork() -> None:
    _child_of(call("clone3", (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17, 0, 0, 0), 64))


@attack
def vfork() -> None:
    call("vfork")


@attack
def thread_by_clone() -> None:
    call("clone", 0x50F00, 0, 0, 0, 0)


@attack
def clone_into_new_namespaces() -> None:
    call("clone", 0x10000000 | 0x20000000 | 17, 0, 0, 0, 0)


@attack
def execve() -> None:
    os.execv("/bin/true", ["true"])


@attack
def execveat_by_descriptor() -> None:
    call("execveat", own_file(), b"", (ctypes.c_char_p * 2)(b"x", None), (ctypes.c_char_p * 1)(None), 0x1000)


@proven
def posix_spawn() -> None:
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


@proven
def subprocess_run() -> None:
    subprocess.run(["/bin/true"], check=True)


@proven
def os_system() -> None:
    if os.system("true") != 0:
        raise PermissionError(1, "system")


@proven
def a_thread() -> None:
    threading.Thread(target=int).start()


@proven
def a_pool_of_threads() -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pool.submit(int).result()


@proven
def a_process_of_multiprocessing() -> None:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()


@attack
def unshare_user() -> None:
    call("unshare", 0x10000000)


@attack
def unshare_files() -> None:
    call("unshare", 0x400)


@attack
def setns() -> None:
    call("setns", own_file(), 0)


@attack
def mount() -> None:
    call("mount", b"none", b"/tmp", b"tmpfs", 0, 0)


@attack
def mount_by_the_new_calls() -> None:
    call("fsopen", b"tmpfs", 0)


@attack
def open_tree() -> None:
    call("open_tree", -100, b"/", 1)


@attack
def umount() -> None:
    call("umount2", b"/proc", 2)


@attack
def chroot() -> None:
    os.chroot("/usr")


@attack
def pivot_root() -> None:
    call("pivot_root", b"/tmp", b"/tmp")


@proven
def personality() -> None:
    call("personality", 0xFFFFFFFF)


@attack
def memory_that_runs_when_read() -> None:
    call("personality", 0x0400000)


@proven
def no_death_signal() -> None:
    control(1, 0)


@proven
def another_death_signal() -> None:
    control(1, 18)


@proven
def adopt_orphans() -> None:
    control(36, 1)


@proven
def let_memory_be_dumped() -> None:
    control(4, 1)


@proven
def keep_capabilities() -> None:
    control(8, 1)


@proven
def timer_slack() -> None:
    control(29, 1_000_000)


@proven
def no_huge_pages_any_more() -> None:
    control(41, 1)


@attack
def name_a_tracer() -> None:
    control(0x59616D61, -1)


@attack
def share_a_core() -> None:
    call("prctl", 62, 1, 0, 0, 0)


@attack
def move_the_heap() -> None:
    call("prctl", 35, 6, 0, 0, 0)


@attack
def more_capabilities_by_prctl() -> None:
    call("prctl", 47, 2, 0, 0, 0)


@attack
def another_seccomp_mode() -> None:
    control(22, 1)


@attack
def seccomp_with_a_listener() -> None:
    program = (ctypes.c_char * 8).from_buffer_copy(bytes.fromhex("060000000000ff7f"))
    fields = (ctypes.c_void_p * 2)(1, ctypes.addressof(program))
    call("seccomp", 1, 8, fields)


@attack
def landlock_of_its_own() -> None:
    call("landlock_create_ruleset", 0, 0, 1)


@attack
def capabilities_back() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", header, (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6))


@proven
def capabilities_of_others() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, os.getppid())
    call("capget", header, (ctypes.c_uint32 * 6)())


@proven
def setuid() -> None:
    os.setuid(os.getuid())


@proven
def setresgid() -> None:
    os.setresgid(-1, -1, -1)


@proven
def file_system_user() -> None:
    call("setfsuid", -1)


@attack
def setgroups() -> None:
    os.setgroups([])


@proven
def file_mode_mask() -> None:
    call("umask", 0o022)


@attack
def more_processor_time() -> None:
    call("setrlimit", resource.RLIMIT_CPU, (ctypes.c_uint64 * 2)(3600, 3600))


@attack
def more_memory() -> None:
    call("prlimit64", 0, resource.RLIMIT_AS, (ctypes.c_uint64 * 2)(2**63, 2**63), 0)


@attack
def more_files() -> None:
    call("setrlimit", resource.RLIMIT_NOFILE, (ctypes.c_uint64 * 2)(1 << 20, 1 << 20))


@attack
def files_of_a_size() -> None:
    call("setrlimit", resource.RLIMIT_FSIZE, (ctypes.c_uint64 * 2)(2**40, 2**40))


@attack
def modules() -> None:
    call("finit_module", own_file(), b"", 0)


@attack
def delete_a_module() -> None:
    call("delete_module", b"nosuchmodule", 0)


@attack
def another_kernel() -> None:
    call("kexec_load", 0, 0, 0, 0)


@attack
def reboot_with_wrong_numbers() -> None:
    call("reboot", 1, 2, 3, 0)


@attack
def hang_up() -> None:
    call("vhangup")


@attack
def accounting() -> None:
    call("acct", b"/nosuchfolder/file")


@attack
def swap() -> None:
    call("swapon", b"/nosuchfolder/file", 0)


@attack
def host_name() -> None:
    name = os.uname().nodename.encode()
    call("sethostname", name, len(name))


@attack
def kernel_log() -> None:
    call("syslog", 10, 0, 0)


@attack
def set_the_clock() -> None:
    call("settimeofday", 0, 0)


@proven
def read_how_the_clock_is_set() -> None:
    call("adjtimex", ctypes.create_string_buffer(256))


@proven
def wait_for_children() -> None:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return


@attack
def ports_of_the_processor() -> None:
    call("iopl", 3)


@attack
def segments_of_16_bits() -> None:
    call("modify_ldt", 0, ctypes.create_string_buffer(16), 16)


@proven
def barriers_on_all_processors() -> None:
    call("membarrier", 0, 0, 0)
