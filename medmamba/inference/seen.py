"""Which names have been seen, in 16 bytes each: a set of a hundred million names still fits into memory."""

from __future__ import annotations

import hashlib

import numpy as np

_RECENT = 1 << 16  # names in a set of Python's, before they join the sorted arrays


class Seen:
    """A set of names that only grows, told apart by 128 bits of BLAKE2."""

    def __init__(self) -> None:
        self._recent: set[bytes] = set()
        self._high, self._low = np.empty(0, np.uint64), np.empty(0, np.uint64)

    def __len__(self) -> int:
        return len(self._recent) + len(self._high)

    def __contains__(self, name: str) -> bool:
        digest = _digest(name)
        return digest in self._recent or self._known(digest)

    def add(self, name: str) -> bool:
        """Adds a name; returns whether it is new."""
        digest = _digest(name)
        if digest in self._recent or self._known(digest):
            return False
        self._recent.add(digest)
        if len(self._recent) >= max(_RECENT, len(self._high) // 16):
            self._merge()
        return True

    def _known(self, digest: bytes) -> bool:
        high, low = np.frombuffer(digest, np.uint64)
        first = int(np.searchsorted(self._high, high))
        while first < len(self._high) and self._high[first] == high:
            if self._low[first] == low:
                return True
            first += 1
        return False

    def _merge(self) -> None:
        new = np.frombuffer(b"".join(self._recent), np.uint64).reshape(-1, 2)
        high, low = np.concatenate([self._high, new[:, 0]]), np.concatenate([self._low, new[:, 1]])
        order = np.argsort(high, kind="stable")
        self._high, self._low = high[order], low[order]
        self._recent.clear()


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
