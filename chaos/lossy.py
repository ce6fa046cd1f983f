"""A lossy link in userspace, for kernels without netem: a process that carries packets between TUN devices.

    python -m baton.chaos.lossy '{"seed": 1, "hosts": {"10.64.0.10": "baton-1-decode-0", ...}}'

It makes a device `lossy0` in each host's namespace and carries IPv4 packets from one to another, by destination, under
the conditions of that direction: delay, jitter (which reorders), loss, duplication, corruption (one bit, anywhere
behind the IP header: checksums are there to catch it), or nothing at all (`cut`). One JSON command per line on stdin,
one answer per line on stdout:

    {"sender": "10.64.0.10", "receiver": "10.64.0.11", "conditions": {"loss": 0.01, "delay_s": 0.005}}   -> {}
    {"sender": ..., "receiver": ...}                                                                     -> its counters

What a packet meets is drawn from the seed, the direction and its number: the n-th packet of a direction has the same
fate in every run. Devices go with the process, and the process with its stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import random
import struct
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

DEVICE = b"lossy0"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_IP_HEADER_BYTES = 20
_MAX_PACKET_BYTES = 65_536
_PACKETS_PER_TURN = 64


@dataclass(frozen=True, slots=True)
class Conditions:
    """Probabilities are per packet."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    cut: bool = False


COUNTERS = ("packets", "lost", "duplicated", "corrupted", "cut")


@dataclass(slots=True)
class Direction:
    """From one host to another."""

    rng: random.Random
    conditions: Conditions = field(default_factory=Conditions)
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))

    def fates(self, packet: bytes) -> list[tuple[float, bytes]]:
        """(delay, bytes) of each copy that arrives. The same number of draws for every packet."""
        c, counters = self.conditions, self.counters
        lost, doubled, damaged, early, late = (self.rng.random() for _ in range(5))
        where = self.rng.randrange(8 * max(1, len(packet) - _IP_HEADER_BYTES))
        counters["packets"] += 1
        if c.cut or lost < c.loss:
            counters["cut" if c.cut else "lost"] += 1
            return []
        if damaged < c.corrupt and len(packet) > _IP_HEADER_BYTES:
            counters["corrupted"] += 1
            packet = _flipped(packet, 8 * _IP_HEADER_BYTES + where)
        arrivals = [(c.delay_s + early * c.jitter_s, packet)]
        if doubled < c.duplicate:
            counters["duplicated"] += 1
            arrivals.append((c.delay_s + late * c.jitter_s, packet))
        return arrivals


def _flipped(packet: bytes, bit: int) -> bytes:
    damaged = bytearray(packet)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


class LossyLink:
    def __init__(self, seed: int, devices: dict[bytes, int]) -> None:
        """`devices`: file descriptors of TUN devices by packed IPv4 address."""
        self._devices = devices
        self._directions: defaultdict[tuple[bytes, bytes], Direction] = defaultdict(
            lambda: Direction(random.Random(f"{seed} {len(self._directions)}"))
        )
        for key in sorted((a, b) for a in devices for b in devices if a != b):
            self._directions[key] = Direction(random.Random(f"{seed} {key[0].hex()} {key[1].hex()}"))

    def serve(self) -> None:
        """From now on, on the running loop."""
        loop = asyncio.get_running_loop()
        for fd in self._devices.values():
            loop.add_reader(fd, self._readable, fd)

    def answer(self, line: str) -> str:
        command: dict[str, Any] = json.loads(line)
        key = (_packed(command["sender"]), _packed(command["receiver"]))
        direction = self._directions[key]
        if "conditions" not in command:
            return json.dumps(direction.counters)
        direction.conditions = Conditions(**command["conditions"])
        return "{}"

    def _readable(self, fd: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(_PACKETS_PER_TURN):
            try:
                packet = os.read(fd, _MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            sender, receiver = packet[12:16], packet[16:20]
            target = self._devices.get(receiver)
            if packet[0] >> 4 != 4 or target is None or sender not in self._devices:
                continue
            for delay_s, copy in self._directions[sender, receiver].fates(packet):
                loop.call_later(delay_s, _deliver, target, copy)


def _deliver(fd: int, packet: bytes) -> None:
    with contextlib.suppress(OSError):  # a full queue or a bad packet: a lossy link loses it
        os.write(fd, packet)


def _packed(address: str) -> bytes:
    return bytes(map(int, address.split(".")))


def open_device(namespace: str) -> int:
    """A TUN device in a network namespace, up, as a descriptor. This thread is in its own namespace again after it."""
    libc = ctypes.CDLL(None, use_errno=True)
    ours = os.open("/proc/self/ns/net", os.O_RDONLY)
    theirs = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(theirs, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", DEVICE, _IFF_TUN | _IFF_NO_PI))
            subprocess.run(["ip", "link", "set", DEVICE.decode(), "up"], check=True, timeout=10)
            with open(f"/proc/sys/net/ipv4/conf/{DEVICE.decode()}/rp_filter", "w") as rp_filter:
                rp_filter.write("0")
        finally:
            libc.setns(ours, _CLONE_NEWNET)
    finally:
        os.close(ours)
        os.close(theirs)
    return fd


async def _serve(seed: int, hosts: dict[str, str]) -> None:
    link = LossyLink(seed, {_packed(address): open_device(namespace) for address, namespace in hosts.items()})
    link.serve()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("{}", flush=True)
    while line := await reader.readline():
        print(link.answer(line.decode()), flush=True)


# ---- the other end of its pipes --------------------------------------------------------------------------------------


class LossyControl:
    """The process, as the runner sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._turn = asyncio.Lock()

    @classmethod
    async def start(cls, seed: int, hosts: dict[str, str]) -> LossyControl:
        """`hosts`: address -> namespace."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "baton.chaos.lossy", json.dumps({"seed": seed, "hosts": hosts}),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )
        self = cls(process)
        await self._read()
        return self

    async def set(self, sender: str, receiver: str, conditions: Conditions) -> None:
        await self._ask({"sender": sender, "receiver": receiver, "conditions": dataclasses.asdict(conditions)})

    async def counters(self, sender: str, receiver: str) -> dict[str, int]:
        return {k: int(v) for k, v in (await self._ask({"sender": sender, "receiver": receiver})).items()}

    async def close(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            return await self._read()

    async def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(20):
            line = await self._process.stdout.readline()
        assert line, "the lossy link has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    asked = json.loads(sys.argv[1])
    asyncio.run(_serve(asked["seed"], asked["hosts"]))


if __name__ == "__main__":
    main()
