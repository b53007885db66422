"""Memory that a task lends to others between its jobs: the front of a device's slab, mirrored in pinned host memory.

What is out is always a prefix, in whole chunks, that grows and shrinks by steps. Addresses stay, so tensors, pointers
in kernels and captured graphs are good again when the bytes are back. That is RT-Swap's swap of memory objects, with
what it leaves to luck done for sure: copies have a stream of their own and are ordered by events, part of it can come
back, bytes that did not change are not copied out again, and every chunk has a digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator

from narrowboat.arena.device.interface import Event
from narrowboat.arena.device.pinned import pinned_slab
from narrowboat.arena.device.slab import DeviceSlab
from narrowboat.errors import DeviceLostError, DeviceMemoryError, DigestError, UsageError
from narrowboat.quantities import format_bytes

_STEP = 32 << 20  # bytes that are mapped or given back while the next are copied


class Mirror:
    """The first bytes of a device's slab, and a place for them in host memory at the same offsets. Thread-safe.

    Args:
        slab: of the device.
        nbytes: how many; also the bytes of host memory that are pinned, rounded up to a page. What lies in the same
            chunk as bytes after them, and those are held, never goes.

    Attributes:
        host: the host memory.
        nbytes: as given, at most the slab's.

    Raises:
        PinnedMemoryError: the system refuses to pin that much.
        StorageError: it has no such memory.
    """

    def __init__(self, slab: DeviceSlab, nbytes: int) -> None:
        if nbytes <= 0:
            raise UsageError(f"a mirror needs at least one byte, not {nbytes}")
        self.slab, self.device = slab, slab.device
        self.nbytes = min(nbytes, slab.nbytes)
        self.host = pinned_slab(self.device, self.nbytes)
        self._stream = self.device.stream("mirror")
        self._out = 0  # chunks
        self._saved: set[int] = set()  # chunks whose bytes the mirror has
        self._digests: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._known = self.device.hand_over()
        self._open = True

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time, and each knows what those before it did."""
        with self._lock:
            if not self._open:
                raise UsageError("the mirror is closed")
            self.device.take_over(self._known)
            try:
                yield
            finally:
                self._known = self.device.hand_over()

    @property
    def out_bytes(self) -> int:
        """Bytes of the device's memory that are given back now: whole chunks."""
        return self._out * self.slab.chunk

    @property
    def evictable_bytes(self) -> int:
        """Bytes of the device's memory that could be given back now, beside those that are."""
        return (self._limit() - self._out) * self.slab.chunk

    def _limit(self) -> int:
        """Chunks that may go."""
        whole, rest = divmod(self.nbytes, self.slab.chunk)
        end = (whole + 1) * self.slab.chunk
        alone = rest and not any(low < end and low + size > self.nbytes for low, size in self.slab.held)
        return whole + bool(alone)

    def _bytes(self, low: int, high: int) -> tuple[int, int]:
        """``(offset, nbytes)`` of the chunks ``[low, high)``."""
        offset = low * self.slab.chunk
        return offset, min(high * self.slab.chunk, self.nbytes) - offset

    def _check_held(self, low: int, high: int) -> None:
        offset, nbytes = self._bytes(low, high)
        for start, size in self.slab.held:
            if start <= offset and offset + nbytes <= start + size:
                return
        raise UsageError(
            f"{self.slab!r} does not hold all of its first {format_bytes(offset + nbytes)}: hold it before evicting"
        )

    # -- out ---------------------------------------------------------------------------------------

    def save(self, *, after: Event | None = None) -> Event:
        """Copy all that may go to the mirror, so that it can later go without a copy. The host waits.

        Args:
            after: see ``evict``.
        """
        with self._turn():
            low, high = self._out, self._limit()
            mark = after or self.device.compute().record()
            if low < high:
                self._check_held(low, high)
                mark = self._copy_out(low, high, mark)[-1][1]
                mark.wait()
                self._keep(range(low, high))
            return mark

    def adopt(self) -> None:
        """The caller has written the same bytes into ``host`` himself, and everything that wrote there is over."""
        with self._turn():
            self._keep(range(self._limit()))

    def evict(self, nbytes: int | None = None, *, save: bool, after: Event | None = None) -> Event:
        """Give memory back to the device. The host waits until it is.

        Args:
            nbytes: at least so many more bytes; None: all that may go.
            save: copy the bytes to the mirror first; otherwise it has the same bytes from an earlier time.
            after: a mark behind everything that uses them; None: what the calling thread has given to its stream.

        Returns:
            A mark behind the last copy.

        Raises:
            UsageError: so many cannot go, or the mirror has not got their bytes; nothing has changed.
        """
        with self._turn():
            low, limit = self._out, self._limit()
            high = limit if nbytes is None else low + -(-nbytes // self.slab.chunk)
            if high > limit:
                raise UsageError(
                    f"{format_bytes(self.evictable_bytes)} can go, and {format_bytes(nbytes or 0)} were asked for: "
                    f"{format_bytes(self.out_bytes)} of the mirrored {format_bytes(self.nbytes)} are out"
                )
            if not save and not self._saved.issuperset(range(low, high)):
                raise UsageError("these bytes were never saved, so they would be lost: evict with save=True")
            mark = after or self.device.compute().record()
            if low >= high:
                return mark
            self._check_held(low, high)
            for upto, event in self._copy_out(low, high, mark) if save else [(high, mark)]:
                self.slab.release([self._bytes(self._out, upto)], after=event)
                self._out, mark = upto, event
            if save:  # when others have the memory already
                self._keep(range(low, high))
            return mark

    def _copy_out(self, low: int, high: int, after: Event) -> list[tuple[int, Event]]:
        """Copies in steps: for each the chunk it reaches to, and a mark behind it."""
        # Of bytes that may have changed the old copy is spoiled from here on.
        self._saved.difference_update(range(low, high))
        self._stream.wait(after)
        marks: list[tuple[int, Event]] = []
        step = max(_STEP // self.slab.chunk, 1)
        for at in range(low, high, step):
            upto = min(at + step, high)
            offset, nbytes = self._bytes(at, upto)
            self.device.copy_out(self.host.address + offset, self.slab.address + offset, nbytes, self._stream)
            marks.append((upto, self._stream.record()))
        return marks

    def _keep(self, chunks: range) -> None:
        for number in chunks:
            self._digests[number] = self._digest(number)
            self._saved.add(number)

    def _digest(self, number: int) -> bytes:
        return hashlib.sha256(self.host.bytes_at(*self._bytes(number, number + 1))).digest()

    # -- back --------------------------------------------------------------------------------------

    def restore(self, nbytes: int | None = None) -> Event:
        """Bring bytes back, those at the end of what is out first. The host waits for nothing but the memory.

        Kernels that the calling thread gives from now on run after the copies. Another thread's stream has to wait for
        the mark.

        Args:
            nbytes: at least so many, or all that are out; None: all.

        Returns:
            A mark behind the last copy.

        Raises:
            DeviceMemoryError: others have the memory. What there was memory for is back, and a later call goes on.
        """
        with self._turn():
            begin = self._out
            low = 0 if nbytes is None else max(begin - -(-nbytes // self.slab.chunk), 0)
            step = max(_STEP // self.slab.chunk, 1)
            try:
                while self._out > low:
                    at = max(self._out - step, low)
                    place = self._bytes(at, self._out)
                    try:
                        self.slab.hold([place])
                    except DeviceMemoryError as error:
                        if self._out - at == 1:
                            raise self._short(begin, low, error) from error
                        step = 1  # as much as there is memory for
                        continue
                    target, source = self.slab.address + place[0], self.host.address + place[0]
                    self.device.copy_in(target, source, place[1], self._stream)
                    self._out = at
            finally:
                mark = self._stream.record()
                self.device.compute().wait(mark)
            return mark

    def _short(self, begin: int, low: int, error: DeviceMemoryError) -> DeviceMemoryError:
        missing, asked = ((chunks - low) * self.slab.chunk for chunks in (self._out, begin))
        return DeviceMemoryError(
            f"{format_bytes(missing)} of {format_bytes(asked)} are still to come back ({error}); what came back "
            "stays, and restore() goes on when there is memory"
        )

    def verify(self) -> None:
        """Compare every saved chunk with its digest: in the mirror, and on the device if it is there. The host waits.

        Raises:
            DigestError: bytes have changed; the message says which and where.
        """
        with self._turn():
            self._stream.wait(self.device.compute().record())
            for number in sorted(self._saved):
                offset, nbytes = self._bytes(number, number + 1)
                where = f"chunk {number} of {self.slab!r} (bytes {offset} to {offset + nbytes})"
                self._stream.synchronize()
                if self._digest(number) != self._digests[number]:
                    raise DigestError(f"{where} has changed in the host memory that mirrors it: load the model anew")
                if number >= self._out and self._digest_on_device(number) != self._digests[number]:
                    raise DigestError(
                        f"{where} has changed on the device since it was saved: something wrote there, or the memory "
                        "failed; evict it with save=False and restore it, or load the model anew"
                    )

    def _digest_on_device(self, number: int) -> bytes:
        # Read into the chunk's own place in the mirror, as more pinned memory is not in the budget.
        offset, nbytes = self._bytes(number, number + 1)
        aside = bytes(self.host.bytes_at(offset, nbytes))
        try:
            self.device.copy_out(self.host.address + offset, self.slab.address + offset, nbytes, self._stream)
            self._stream.synchronize()
            return self._digest(number)
        finally:
            self.device.host_writes(self.host.address + offset, nbytes)
            self.host.bytes_at(offset, nbytes)[:] = aside

    # -- end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the host memory back; what is out then is lost. Copies are waited for. Idempotent."""
        with self._lock:
            if self._open:
                self._open = False
                self.device.take_over(self._known)
                with contextlib.suppress(DeviceLostError):
                    self.device.synchronize()  # not the stream alone: a finalizer may find it gone
                self.device.unpin(self.host)
                self.host.close()

    def __del__(self) -> None:
        if self.__dict__.get("_open"):
            self.device.reclaim(self.close)
