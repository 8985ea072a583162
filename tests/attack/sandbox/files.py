"""Attacks: files that are read, changed, locked or watched."""

import ctypes
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from tests.attack.sandbox.prelude import VICTIM, attack, call, own_file, proven

PATH = str(VICTIM.get("file"))
FOLDER = str(VICTIM.get("folder"))
BESIDE = FOLDER + "/made"


def _removed(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        os.rmdir(path)
    else:
        os.unlink(path)


@proven
def read_a_secret() -> None:
    assert Path(PATH).read_text() == "secret"


@proven
def read_a_secret_by_proc() -> None:
    os.open(f"/proc/self/root{PATH}", os.O_RDONLY)


@proven
def read_a_secret_from_its_folder() -> None:
    os.chdir(FOLDER)
    os.open(os.path.basename(PATH), os.O_RDONLY)


@proven
def list_a_folder() -> None:
    os.listdir(FOLDER)


@proven
def hold_a_path() -> None:
    os.open(PATH, os.O_PATH)


@proven
def hold_a_path_of_python() -> None:
    os.open(os.__file__, os.O_PATH)


@proven
def the_users() -> None:
    Path("/etc/passwd").read_bytes()


@attack
def open_by_the_new_call() -> None:
    call("openat2", -100, PATH.encode(), (ctypes.c_uint64 * 3)(), 24)


@attack
def handle_of_a_file() -> None:
    handle = (ctypes.c_uint32 * 34)(128)
    call("name_to_handle_at", -100, PATH.encode(), handle, ctypes.create_string_buffer(8), 0)


@attack
def open_by_handle() -> None:
    call("open_by_handle_at", own_file(), (ctypes.c_uint32 * 34)(8, 1), 0)


@proven
def make_a_file() -> None:
    Path(BESIDE).write_text("x")
    _removed(BESIDE)


@attack
def make_a_file_in_python() -> None:
    Path(os.__file__).with_name("made.py").write_text("x")


@attack
def creat() -> None:
    call("creat", BESIDE.encode(), 0o600)


@proven
def make_a_temporary_file() -> None:
    descriptor, path = tempfile.mkstemp(dir=FOLDER)
    os.close(descriptor)
    _removed(path)


@attack
def make_a_nameless_file() -> None:
    os.open(FOLDER, os.O_TMPFILE | os.O_RDWR)


@proven
def write_to_a_file() -> None:
    with open(PATH, "a"):
        pass


@attack
def empty_a_file() -> None:
    os.open(PATH, os.O_RDONLY | os.O_TRUNC)


@attack
def truncate() -> None:
    os.truncate(PATH, 0)


@attack
def ftruncate() -> None:
    call("ftruncate", own_file(), 0)


@attack
def fallocate() -> None:
    call("fallocate", own_file(), 0, 0, 1)


@attack
def write_at_a_place() -> None:
    call("pwrite64", own_file(), b"x", 1, 0)


@attack
def remove() -> None:
    os.remove(PATH)


@attack
def remove_python() -> None:
    os.remove(os.__file__)


@attack
def rename() -> None:
    os.rename(PATH, BESIDE)


@attack
def exchange() -> None:
    call("renameat2", -100, PATH.encode(), -100, BESIDE.encode(), 2)


@proven
def make_a_folder() -> None:
    os.mkdir(BESIDE)
    _removed(BESIDE)


@attack
def remove_a_folder() -> None:
    os.rmdir(FOLDER)


@proven
def symlink() -> None:
    os.symlink(PATH, BESIDE)
    _removed(BESIDE)


@proven
def hard_link() -> None:
    os.link(PATH, BESIDE)
    _removed(BESIDE)


@proven
def fifo() -> None:
    os.mkfifo(BESIDE)
    _removed(BESIDE)


@attack
def device() -> None:
    os.mknod(BESIDE, 0o20600, os.makedev(1, 1))


@proven
def copy_a_file() -> None:
    shutil.copy(os.__file__, BESIDE)
    _removed(BESIDE)


@proven
def mode() -> None:
    os.chmod(PATH, 0o600)


@attack
def mode_of_a_descriptor() -> None:
    call("fchmod", own_file(), 0o644)


@attack
def mode_by_the_new_call() -> None:
    call("fchmodat2", -100, PATH.encode(), 0o600, 0)


@proven
def owner() -> None:
    os.chown(PATH, -1, -1)


@attack
def owner_of_a_descriptor() -> None:
    call("fchown", own_file(), -1, -1)


@proven
def times() -> None:
    os.utime(PATH)


@attack
def times_of_a_descriptor() -> None:
    os.utime(own_file())


@attack
def extended_attribute() -> None:
    os.setxattr(PATH, "user.x", b"x")


@proven
def list_extended_attributes() -> None:
    os.listxattr(PATH)


@attack
def extended_attribute_by_the_new_call() -> None:
    call("setxattrat", -100, PATH.encode(), 0, b"user.x", 0, 0)


@attack
def see_attributes() -> None:
    call("ioctl", own_file(), 0x80086601, ctypes.create_string_buffer(8))


@attack
def set_attributes_to_what_they_are() -> None:
    flags, descriptor = ctypes.create_string_buffer(8), own_file()
    try:
        call("ioctl", descriptor, 0x80086601, flags)
    except PermissionError:
        call("ioctl", descriptor, 0x40086602, 0)
    call("ioctl", descriptor, 0x40086602, flags)


@attack
def see_further_attributes() -> None:
    call("ioctl", own_file(), 0x801C581F, ctypes.create_string_buffer(28))


@attack
def set_further_attributes() -> None:
    call("ioctl", own_file(), 0x401C5820, 0)


@attack
def read_only_for_ever() -> None:
    call("ioctl", own_file(), 0x40806685, 0)


@attack
def share_extents() -> None:
    call("ioctl", own_file(), 0x40049409, own_file())


@proven
def block_size() -> None:
    call("ioctl", own_file(), 2, ctypes.create_string_buffer(8))


@attack
def blocks_of_a_file() -> None:
    call("ioctl", own_file(), 0xC020660B, ctypes.create_string_buffer(64))


@attack
def freeze_the_file_system() -> None:
    call("ioctl", own_file(), 0xC0045877, 0)


@proven
def lock_for_all() -> None:
    fcntl.flock(own_file(), fcntl.LOCK_EX | fcntl.LOCK_NB)


@proven
def lock_shared() -> None:
    fcntl.flock(own_file(), fcntl.LOCK_SH | fcntl.LOCK_NB)


@proven
def lock_a_region() -> None:
    fcntl.lockf(own_file(), fcntl.LOCK_SH | fcntl.LOCK_NB)


def _region() -> bytes:
    return bytes(32)


@proven
def lock_a_region_for_the_open_file() -> None:
    call("fcntl", own_file(), 37, _region())


@proven
def who_locks() -> None:
    call("fcntl", own_file(), 5, _region())


@attack
def lease() -> None:
    call("fcntl", own_file(), 1024, 0)


@attack
def delegation() -> None:
    call("fcntl", own_file(), 1040, 0)


@attack
def be_told_of_a_folders_changes() -> None:
    call("fcntl", os.open(os.path.dirname(os.__file__), os.O_RDONLY), 1026, 0x80000002)


@attack
def how_long_a_file_lives() -> None:
    call("fcntl", own_file(), 1036, (ctypes.c_uint64 * 1)(0))


@proven
def watch_a_file() -> None:
    call("inotify_add_watch", call("inotify_init1", 0), PATH.encode(), 0xFFF)


@attack
def watch_all_files() -> None:
    call("fanotify_init", 0, 0)


@attack
def watch_mounts() -> None:
    call("statmount", 0, 0, 0, 0)


@proven
def space_on_disk() -> None:
    os.statvfs("/")


@attack
def quotas() -> None:
    call("quotactl", 0x80000700, b"/", 0, ctypes.create_string_buffer(128))


@proven
def write_all_disks_out() -> None:
    call("sync")


@proven
def write_a_disk_out() -> None:
    call("syncfs", own_file())


@proven
def write_a_file_out() -> None:
    os.fsync(own_file())


@proven
def put_a_file_out_of_memory() -> None:
    os.posix_fadvise(own_file(), 0, 0, os.POSIX_FADV_DONTNEED)


@proven
def read_ahead() -> None:
    call("readahead", own_file(), 0, 4096)


@proven
def send_a_file() -> None:
    _, writing = os.pipe()
    os.sendfile(writing, own_file(), 0, 10)


@attack
def copy_a_range() -> None:
    call("copy_file_range", own_file(), 0, own_file(), 0, 1, 0)


@attack
def a_library_by_the_old_call() -> None:
    call("uselib", b"/lib/libc.so.6")
