"""Hosts as network namespaces of one machine: each has an address and a cable of its own, so that cables can be cut.

                         switch (a namespace with a bridge)
      this process ---- port     port ---- host      one veth pair per cable
      port of the lossy link ---------------- host   a TUN device in each host (chaos/lossy.py); used by a pair of hosts
                                                     when the routes between them are turned to it

Owns the namespaces and everything in them: closing it, or the next start after a kill, removes them all. What can be
done to a cable:

    cut one way     nftables drops what one host sends another, at the receiver; its counter says how much
    down            the switch's end of the cable is down: both ways, from everybody
    limit           a token bucket (tbf) on what a host sends; its backlog says how many bytes wait in it
    lossy           the route of a pair goes through the userspace link
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from baton.chaos.tools import run_tool
from baton.cluster.processes import gone
from baton.core.errors import SetupError

PREFIX = "baton"
CABLE, TUN = "eth0", "lossy0"
TABLE = "chaos"
_DIRECTORY = Path("/run/netns")
_DEVICES = Path("/sys/class/net")
TOOLS = ("ip", "nft", "tc")


@dataclass(frozen=True, slots=True)
class Host:
    """Where a process runs. Without a namespace: on this machine's loopback."""

    name: str
    address: str = "127.0.0.1"
    namespace: str | None = None

    @property
    def command_prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace) if self.namespace else ()


async def why_no_namespaces() -> str | None:
    """None: they can be had here. Else what is missing."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (apt-get install iproute2 nftables)"
    if os.geteuid() != 0:
        return "not root"
    name = f"{PREFIX}-{os.getpid()}-probe"
    try:
        await run_tool("ip", "netns", "add", name)
        try:
            await run_tool("ip", "netns", "exec", name, "nft", "add", "table", "inet", TABLE)
            await run_tool("ip", "-n", name, "link", "add", "br0", "type", "bridge")
        finally:
            await run_tool("ip", "netns", "del", name)
    except SetupError as e:
        return e.message
    return None


async def sweep() -> None:
    """Remove the namespaces of runs that were killed."""
    for owner, name in await _namespaces():
        if gone(owner):
            await run_tool("ip", "netns", "del", name)


async def namespaces_of(pid: int) -> list[str]:
    return [name for owner, name in await _namespaces() if owner == pid] if shutil.which("ip") else []


async def _namespaces() -> list[tuple[int, str]]:
    """(pid of the run, name)."""
    names = [line.split()[0] for line in (await run_tool("ip", "netns", "list")).splitlines()]
    found = (re.fullmatch(rf"{PREFIX}-(\d+)-.+", name) for name in names)
    return [(int(match[1]), match[0]) for match in found if match]


@dataclass(slots=True)
class Namespaces:
    """Built by `open_namespaces`, ended by `close`."""

    hosts: dict[str, Host]
    switch: str
    device: str
    """Our own end of our cable."""
    _ports: dict[str, str]
    _num_cuts: int = 0
    _down: set[str] = field(default_factory=set)

    def has_lossy_link(self) -> bool:
        return Path("/dev/net/tun").exists()

    # ---- cut one way -------------------------------------------------------------------------------------------------

    async def cut(self, sender: str, receiver: str) -> str:
        """From now on nothing that `sender` sends reaches `receiver`. Returns the cut's name."""
        self._num_cuts += 1
        chain, where = f"cut{self._num_cuts}", self._namespace(receiver)
        await _nft(where, f"add chain inet {TABLE} {chain} {{ type filter hook input priority 0; }}")
        await _nft(where, f"add rule inet {TABLE} {chain} ip saddr {self.hosts[sender].address} counter drop")
        return chain

    async def dropped(self, receiver: str, chain: str) -> int:
        """Packets the cut has swallowed so far."""
        text = await run_tool(
            "ip", "netns", "exec", self._namespace(receiver), "nft", "-j", "list", "chain", "inet", TABLE, chain
        )
        rules = [item["rule"] for item in json.loads(text)["nftables"] if "rule" in item]
        counters = [e["counter"]["packets"] for rule in rules for e in rule["expr"] if "counter" in e]
        return int(sum(counters))

    async def mend(self, receiver: str, chain: str) -> None:
        await _nft(self._namespace(receiver), f"flush chain inet {TABLE} {chain}")
        await _nft(self._namespace(receiver), f"delete chain inet {TABLE} {chain}")

    # ---- down --------------------------------------------------------------------------------------------------------

    async def set_cable(self, host: str, up: bool) -> None:
        await run_tool("ip", "-n", self.switch, "link", "set", self._ports[host], "up" if up else "down")

    async def cable_is_up(self, host: str) -> bool:
        (link,) = json.loads(await run_tool("ip", "-n", self._namespace(host), "-j", "link", "show", CABLE))
        return bool(link["operstate"] == "UP")

    # ---- limit -------------------------------------------------------------------------------------------------------

    async def limit(self, host: str, bits_per_s: int) -> None:
        """Of what the host sends. The queue holds half a second; what does not fit is dropped."""
        await run_tool(
            "tc", "-n", self._namespace(host), "qdisc", "replace", "dev", CABLE, "root", "tbf",
            "rate", f"{bits_per_s}bit", "burst", "4kb", "latency", "500ms",
        )

    async def limited(self, host: str) -> tuple[int, int]:
        """(times the limit made a packet wait, bytes waiting now)."""
        text = await run_tool("tc", "-n", self._namespace(host), "-s", "-j", "qdisc", "show", "dev", CABLE)
        (queue,) = [q for q in json.loads(text) if q["kind"] == "tbf"]
        return int(queue["overlimits"]), int(queue["backlog"])

    async def unlimit(self, host: str) -> None:
        await run_tool("tc", "-n", self._namespace(host), "qdisc", "del", "dev", CABLE, "root")

    # ---- lossy -------------------------------------------------------------------------------------------------------

    async def use_lossy(self, a: str, b: str, on: bool) -> None:
        """Turn the routes between two hosts to their TUN devices, or back. Connections that are open go on."""
        for one, other in ((a, b), (b, a)):
            route = f"{self.hosts[other].address}/32"
            words = ("replace", route, "dev", TUN, "src", self.hosts[one].address) if on else ("del", route)
            await run_tool("ip", "-n", self._namespace(one), "route", *words)

    async def close(self) -> None:
        """Every process in them should have ended. Safe to call twice."""
        if (_DEVICES / self.device).exists():  # a namespace takes its devices along, but later
            await run_tool("ip", "link", "del", self.device)
        for namespace in (*(h.namespace for h in self.hosts.values()), self.switch):
            if namespace and (_DIRECTORY / namespace).exists():
                await run_tool("ip", "netns", "del", namespace)

    def _namespace(self, host: str) -> str:
        namespace = self.hosts[host].namespace
        assert namespace is not None, host
        return namespace


async def open_namespaces(names: Iterable[str]) -> Namespaces:
    """One per name, each reaches each other and this process. Raises SetupError; then nothing is left."""
    pid = os.getpid()
    network = f"10.{64 + (pid >> 8) % 64}.{pid % 256}"
    hosts = {
        name: Host(name, f"{network}.{10 + i}", f"{PREFIX}-{pid}-{name}") for i, name in enumerate(names)
    }
    ports = {name: f"port{i}" for i, name in enumerate(hosts)}
    net = Namespaces(hosts, f"{PREFIX}-{pid}-switch", f"{PREFIX}{pid}", ports)
    try:
        await run_tool("ip", "netns", "add", net.switch)
        await run_tool("ip", "-n", net.switch, "link", "add", "br0", "type", "bridge")
        await run_tool("ip", "-n", net.switch, "link", "set", "br0", "up")
        await _plug_in(net.switch, net.device, f"{network}.1", None, "here")
        for name, host in hosts.items():
            assert host.namespace is not None
            await run_tool("ip", "netns", "add", host.namespace)
            await _plug_in(net.switch, CABLE, host.address, host.namespace, ports[name])
            await _nft(host.namespace, f"add table inet {TABLE}")
    except BaseException:
        await asyncio.shield(net.close())
        raise
    return net


async def _plug_in(switch: str, device: str, address: str, namespace: str | None, port: str) -> None:
    inside = ("-n", namespace) if namespace else ()
    end = (device, *(("netns", namespace) if namespace else ()))
    await run_tool("ip", "link", "add", *end, "type", "veth", "peer", "name", port, "netns", switch)
    await run_tool("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
    await run_tool("ip", *inside, "addr", "add", f"{address}/24", "dev", device)
    await run_tool("ip", *inside, "link", "set", device, "up")
    if namespace:
        await run_tool("ip", *inside, "link", "set", "lo", "up")
        # Packets may come in over the lossy link and leave by the cable while routes are being turned.
        script = "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done"
        await run_tool("ip", "netns", "exec", namespace, "sh", "-c", script)


async def _nft(namespace: str, statement: str) -> None:
    await run_tool("ip", "netns", "exec", namespace, "nft", statement)
