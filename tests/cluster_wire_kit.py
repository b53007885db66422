"""A cable with a delay, or that carries one way only, made of two packet sockets: not every kernel has netem.

    python cluster_wire_kit.py plain INTERFACE...  have the kernel send whole packets, with their checksums
    python cluster_wire_kit.py carry ONE OTHER SECONDS WAYS  carry what comes between two interfaces, until killed

Runs within a network namespace. WAYS is "both", or "there" (from ONE to OTHER) or "back" alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import select
import socket
import struct
import sys
import time

_SIOCETHTOOL = 0x8946
_OFF = (0x17, 0x1F, 0x24)  # ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO
_ALL = 0x0003  # ETH_P_ALL


class _Value(ctypes.Structure):
    """``struct ethtool_value``."""

    _fields_ = (("cmd", ctypes.c_uint32), ("data", ctypes.c_uint32))


def plain(interface: str) -> None:
    """Nothing that leaves here is left for hardware to finish: a packet socket would see it unfinished."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for command in _OFF:
            value = _Value(command, 0)
            fcntl.ioctl(asked, _SIOCETHTOOL, struct.pack("16sP", interface.encode(), ctypes.addressof(value)))


def carry(one: str, other: str, seconds: float, ways: str) -> None:
    """Every packet is ``seconds`` on its way; those of a way that is not carried are dropped."""
    ends = [_open(one), _open(other)]
    carried = {ends[0]: ways in ("both", "there"), ends[1]: ways in ("both", "back")}
    under_way: list[tuple[float, int, socket.socket, bytes]] = []
    number = itertools.count()
    print("carries", flush=True)
    while True:
        wait = max(under_way[0][0] - time.monotonic(), 0.0) if under_way else None
        for end in select.select(ends, [], [], wait)[0]:
            packet, origin = end.recvfrom(1 << 16)
            if origin[2] == socket.PACKET_OUTGOING or not carried[end]:
                continue
            onward = ends[1] if end is ends[0] else ends[0]
            heapq.heappush(under_way, (time.monotonic() + seconds, next(number), onward, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, onward, packet = heapq.heappop(under_way)
            with contextlib.suppress(OSError):  # the other end is down: lost, as on any cable
                onward.send(packet)


def _open(interface: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
    made.bind((interface, 0))
    return made


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        for name in sys.argv[2:]:
            plain(name)
    else:
        carry(sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5])
