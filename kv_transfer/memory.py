"""The bytes of a worker's KV blocks: one contiguous range, so that a block is one descriptor for every transport.

Owns the memory and its name (fd, address). Does not know which block belongs to whom: that is the block pool's.

Behind the pool's blocks lie a few the pool never sees:

    [0, num_blocks)                    the pool
    num_blocks                         the probe block: a fixed pattern that any peer may read in the handshake
    [num_blocks + 1, total_blocks)     landing blocks: where this worker's own handshakes pull a peer's probe block to

Life: made once per boot -> registered with the transports, viewed by the runner -> closed after both. Shared memory
is an anonymous memfd: it has no name in any file system, so a killed worker leaves nothing behind. It is sealed
against resizing and against writing by anybody who gets the descriptor later.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os

from baton.kv_transfer.digest import digest

NUM_LANDING_BLOCKS = 4
_F_SEAL_FUTURE_WRITE = 0x0010  # Linux 5.1; Python's fcntl does not name it. Our own mapping stays writable.


class KVMemory:
    """num_blocks blocks of block_bytes bytes, zeroed. `fd` is None unless `shared`."""

    def __init__(self, num_blocks: int, block_bytes: int, shared: bool) -> None:
        assert min(num_blocks, block_bytes) > 0, f"{num_blocks} blocks of {block_bytes} bytes"
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.probe_block = num_blocks
        self.landing_blocks = tuple(range(num_blocks + 1, num_blocks + 1 + NUM_LANDING_BLOCKS))
        self.total_blocks = num_blocks + 1 + NUM_LANDING_BLOCKS
        self.total_bytes = self.total_blocks * block_bytes
        self.fd: int | None = None
        backing: mmap.mmap | bytearray
        if shared:
            self.fd = _sealed_memfd(self.total_bytes)
            backing = mmap.mmap(self.fd, self.total_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        else:
            backing = bytearray(self.total_bytes)
        self._backing = backing
        self._view = memoryview(backing)
        pattern = probe_pattern(block_bytes)
        self.block(self.probe_block)[:] = pattern
        self.probe_digest = digest(pattern)

    @property
    def buffer(self) -> memoryview:
        """The pool's blocks, writable: num_blocks * block_bytes bytes."""
        return self._view[: self.num_blocks * self.block_bytes]

    @property
    def all_blocks(self) -> memoryview:
        """Probe and landing blocks included, writable: total_bytes bytes."""
        return self._view[:]

    @property
    def address(self) -> int:
        """Where block 0 starts in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._backing))

    def block(self, index: int) -> memoryview:
        """The bytes of one block, writable; probe and landing blocks included."""
        assert 0 <= index < self.total_blocks, f"block {index} of {self.total_blocks}"
        start = index * self.block_bytes
        return self._view[start : start + self.block_bytes]

    def close(self) -> None:
        """Give descriptor and mapping back, after the transports. A mapping that is still viewed goes with its last
        view."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self._view.release()
        if isinstance(self._backing, mmap.mmap):
            with contextlib.suppress(BufferError):
                self._backing.close()  # it holds a descriptor of its own


def probe_pattern(num_bytes: int) -> bytes:
    """The same bytes on every worker, and different ones at every offset."""
    return hashlib.shake_128(b"baton probe block").digest(num_bytes)


def _sealed_memfd(num_bytes: int) -> int:
    fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    # A reader must be able to rely on the size: reading past the end of a shrunk file kills the reader.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd
