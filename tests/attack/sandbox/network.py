"""Attacks: sockets of all kinds."""

import asyncio
import socket
import urllib.request

from tests.attack.sandbox.prelude import VICTIM, attack, call, proven


def _made(family: int, kind: int, protocol: int = 0) -> None:
    socket.socket(family, kind, protocol).close()


@proven
def tcp() -> None:
    with socket.create_connection(("127.0.0.1", VICTIM["port"]), 3):
        pass


@proven
def udp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("127.0.0.1", 9))


@attack
def tcp6() -> None:
    _made(socket.AF_INET6, socket.SOCK_STREAM)


@attack
def raw() -> None:
    _made(socket.AF_INET, socket.SOCK_RAW, 1)


@attack
def multipath_tcp() -> None:
    _made(socket.AF_INET, socket.SOCK_STREAM, 262)


@attack
def packets() -> None:
    _made(socket.AF_PACKET, socket.SOCK_RAW)


@proven
def netlink() -> None:
    _made(socket.AF_NETLINK, socket.SOCK_RAW)


@attack
def between_virtual_machines() -> None:
    _made(40, socket.SOCK_STREAM)


@attack
def ciphers_of_the_kernel() -> None:
    _made(38, socket.SOCK_SEQPACKET)


@attack
def bluetooth() -> None:
    _made(31, socket.SOCK_RAW)


@proven
def abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + VICTIM["abstract"])


@proven
def socket_pair() -> None:
    socket.socketpair()


@proven
def listen() -> None:
    socket.create_server(("127.0.0.1", 0)).close()


@proven
def event_loop() -> None:
    asyncio.run(asyncio.sleep(0))


@attack
def a_page() -> None:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{VICTIM['port']}/", timeout=3)
    except urllib.error.URLError as error:
        raise error.reason from None  # type: ignore[misc]


@attack
def sockets_that_were_left_open() -> None:
    """Each call on sockets is refused, even for a descriptor that should not exist."""
    for name, *arguments in (
        ("connect", 3, 0, 0),
        ("bind", 3, 0, 0),
        ("listen", 3, 1),
        ("accept", 3, 0, 0),
        ("accept4", 3, 0, 0, 0),
        ("sendto", 3, 0, 0, 0, 0, 0),
        ("recvfrom", 3, 0, 0, 0, 0, 0),
        ("sendmsg", 3, 0, 0),
        ("recvmsg", 3, 0, 0),
        ("sendmmsg", 3, 0, 0, 0),
        ("recvmmsg", 3, 0, 0, 0, 0),
        ("getsockname", 3, 0, 0),
        ("getpeername", 3, 0, 0),
        ("setsockopt", 3, 0, 0, 0, 0),
        ("getsockopt", 3, 0, 0, 0, 0),
        ("shutdown", 3, 2),
    ):
        try:
            call(name, *arguments)
        except PermissionError:
            continue
        return
    raise PermissionError(1, "all")
