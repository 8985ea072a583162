"""Attacks: memory, queues and other kernel objects that processes share or that no limit counts."""

import ctypes
import mmap
import multiprocessing
import multiprocessing.shared_memory
import os
import struct

from tests.attack.sandbox.prelude import VICTIM, attack, call, proven

PAGE = mmap.PAGESIZE


@proven
def shm_get() -> None:
    call("shmctl", call("shmget", 0, 4096, 0o1600), 0, 0)


@proven
def shm_attach() -> None:
    call("shmat", VICTIM["segment"], 0, 0o10000)


@proven
def shm_list() -> None:
    call("shmctl", 0, 14, ctypes.create_string_buffer(256))


@proven
def shm_look() -> None:
    call("shmctl", VICTIM["segment"], 2, ctypes.create_string_buffer(256))


@attack
def shm_write() -> None:
    ctypes.memmove(call("shmat", VICTIM["segment"], 0, 0), b"OWNED!", 6)


@attack
def shm_remove() -> None:
    call("shmctl", VICTIM["segment"], 0, 0)


@attack
def shm_detach() -> None:
    call("shmdt", 0)


@proven
def msg_get() -> None:
    call("msgctl", call("msgget", 0, 0o1600), 0, 0)


@proven
def msg_look() -> None:
    call("msgctl", VICTIM["queue"], 2, ctypes.create_string_buffer(256))


@attack
def msg_take() -> None:
    call("msgrcv", VICTIM["queue"], ctypes.create_string_buffer(64), 32, 0, 0o4000)


@attack
def msg_put() -> None:
    call("msgsnd", VICTIM["queue"], struct.pack("=q", 1) + b"FALSE", 5, 0o4000)


@attack
def msg_remove() -> None:
    call("msgctl", VICTIM["queue"], 0, 0)


@proven
def sem_get() -> None:
    call("semctl", call("semget", 0, 1, 0o1600), 0, 0, 0)


@proven
def sem_look() -> None:
    call("semctl", VICTIM["semaphore"], 0, 12, 0)


@attack
def sem_set() -> None:
    call("semctl", VICTIM["semaphore"], 0, 16, 77)


@attack
def sem_operate() -> None:
    call("semop", VICTIM["semaphore"], struct.pack("=HhH", 0, 1, 0), 1)


@attack
def sem_operate_with_a_time() -> None:
    call("semtimedop", VICTIM["semaphore"], struct.pack("=HhH", 0, 1, 0), 1, 0)


@attack
def sem_remove() -> None:
    call("semctl", VICTIM["semaphore"], 0, 0, 0)


@attack
def mq_open() -> None:
    call("mq_open", b"emlocal-attack", os.O_CREAT | os.O_RDWR, 0o600, 0)


@attack
def mq_unlink() -> None:
    call("mq_unlink", b"emlocal-attack")


@attack
def mq_timedreceive() -> None:
    call("mq_timedreceive", -1, 0, 0, 0, 0)


@proven
def posix_shared_memory() -> None:
    with open(VICTIM["posix"], "rb") as file:
        assert file.read().startswith(b"VICTIM")


@proven
def posix_shared_memory_of_its_own() -> None:
    memory = multiprocessing.shared_memory.SharedMemory(create=True, size=64)
    memory.close()
    memory.unlink()


@proven
def posix_semaphore() -> None:
    multiprocessing.get_context("fork").Semaphore()


@proven
def memfd() -> None:
    os.memfd_create("x")


@attack
def memfd_secret() -> None:
    call("memfd_secret", 0)


@attack
def userfaultfd() -> None:
    call("userfaultfd", 1)


@attack
def io_uring() -> None:
    call("io_uring_setup", 8, ctypes.create_string_buffer(120))


@attack
def io_uring_enter() -> None:
    call("io_uring_enter", -1, 1, 0, 0, 0, 0)


@attack
def io_uring_register() -> None:
    call("io_uring_register", -1, 0, 0, 0)


@attack
def asynchronous_reads() -> None:
    call("io_setup", 8, ctypes.create_string_buffer(bytes(8), 8))


@attack
def asynchronous_submit() -> None:
    call("io_submit", 0, 0, 0)


@attack
def add_a_key() -> None:
    call("add_key", b"user", b"emlocal-attack", b"x", 1, -3)


@attack
def request_a_key() -> None:
    call("request_key", b"user", b"emlocal-attack", 0, 0)


@attack
def list_keys() -> None:
    call("keyctl", 11, -4, 0, 0, 0)


@attack
def new_session_of_keys() -> None:
    call("keyctl", 1, 0, 0, 0, 0)


@attack
def bpf_map() -> None:
    call("bpf", 0, struct.pack("=4I", 1, 4, 4, 1).ljust(120, b"\0"), 120)


@attack
def bpf_program() -> None:
    call("bpf", 5, bytes(120), 120)


@proven
def lock_memory() -> None:
    call("mlock", ctypes.addressof(ctypes.create_string_buffer(8)), 8)


@attack
def lock_memory_to_come() -> None:
    call("mlockall", 2)


@proven
def locked_mapping() -> None:
    call("mmap", 0, PAGE, 3, 0x2022, -1, 0)


@attack
def huge_pages_of_the_machine() -> None:
    call("mmap", 0, 2 << 20, 3, 0x40022, -1, 0)


@proven
def memory_to_write_and_run() -> None:
    mmap.mmap(-1, PAGE, prot=7)


@proven
def memory_written_then_run() -> None:
    call("mprotect", call("mmap", 0, PAGE, 3, 0x22, -1, 0), PAGE, 5)


@proven
def own_code_written() -> None:
    call("mprotect", call("mmap", 0, PAGE, 1, 0x22, -1, 0), PAGE, 7)


@proven
def memory_run_only() -> None:
    call("mmap", 0, PAGE, 4, 0x22, -1, 0)


@proven
def keys_of_protection() -> None:
    call("pkey_mprotect", call("mmap", 0, PAGE, 3, 0x22, -1, 0), PAGE, 5, -1)


@proven
def which_pages_are_in_memory() -> None:
    with open(VICTIM["readable"], "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=1)
        address = call("mmap", 0, PAGE, 1, 2, file.fileno(), 0)
        call("mincore", address, PAGE, ctypes.create_string_buffer(64))
        mapped.close()


@attack
def which_pages_are_in_memory_by_reading() -> None:
    into = ctypes.create_string_buffer(16)
    vector = (ctypes.c_uint64 * 2)(ctypes.addressof(into), 16)
    with open(VICTIM["readable"], "rb") as file:
        call("preadv2", file.fileno(), vector, 1, 0, 0, 8)


@attack
def which_pages_are_in_memory_by_cachestat() -> None:
    with open(VICTIM["readable"], "rb") as file:
        call("cachestat", file.fileno(), (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)(), 0)


@attack
def merge_equal_pages() -> None:
    call("madvise", call("mmap", 0, PAGE, 3, 0x22, -1, 0), PAGE, 12)


@proven
def page_out() -> None:
    call("madvise", call("mmap", 0, PAGE, 3, 0x22, -1, 0), PAGE, 20)


@attack
def poison_memory() -> None:
    call("madvise", call("mmap", 0, PAGE, 3, 0x22, -1, 0), PAGE, 100)


@attack
def remap_file_pages() -> None:
    call("remap_file_pages", call("mmap", 0, PAGE, 3, 0x21, -1, 0), PAGE, 0, 0, 0)


@proven
def memory_policy() -> None:
    call("set_mempolicy", 0, 0, 0)


@proven
def futex_that_others_share() -> None:
    call("futex", ctypes.create_string_buffer(8), 1, 1, 0, 0, 0)


@proven
def futex_with_priorities() -> None:
    call("futex", (ctypes.c_uint32 * 1)(0), 0x80 | 6, 0, 0, 0, 0)


@attack
def futex_by_the_new_calls() -> None:
    call("futex_waitv", 0, 0, 0, 0, 0)


@proven
def larger_pipe() -> None:
    reading, _ = os.pipe()
    call("fcntl", reading, 1031, 1 << 20)


@attack
def pipe_of_the_kernels_messages() -> None:
    call("pipe2", (ctypes.c_int * 2)(), 0x80)


@proven
def splice() -> None:
    (reading, writing), (_, other) = os.pipe(), os.pipe()
    os.write(writing, b"x")
    call("splice", reading, 0, other, 0, 1, 0)


@proven
def tee() -> None:
    (reading, writing), (_, other) = os.pipe(), os.pipe()
    os.write(writing, b"x")
    call("tee", reading, other, 1, 0)


@proven
def vmsplice() -> None:
    _, writing = os.pipe()
    what = ctypes.create_string_buffer(8)
    call("vmsplice", writing, (ctypes.c_uint64 * 2)(ctypes.addressof(what), 8), 1, 0)


@proven
def eventfd() -> None:
    call("eventfd2", 0, 0)


@proven
def timerfd() -> None:
    call("timerfd_create", 1, 0)


@proven
def signalfd() -> None:
    call("signalfd4", -1, ctypes.create_string_buffer(8), 8, 0)


@proven
def epoll() -> None:
    call("epoll_create1", 0)


@attack
def forty_thousand_mappings_of_huge_size() -> None:
    try:
        _ = [mmap.mmap(-1, 1 << 30) for _ in range(40_000)]
    except (OSError, MemoryError) as error:
        raise PermissionError(1, str(error)) from None
