"""Names of images within a shard: made printable, and unique."""

import hashlib

import numpy as np
import numpy.typing as npt

_MERGE_AT = 65_536


class UniqueKeys:
    """Gives repeated keys a number: the second `a.jpg` becomes `a.jpg#2`.

    Remembers keys as 64-bit hashes, 8 bytes for each once sorted in, so that a shard of 10 million images takes
    80 MB; two different keys of such a shard collide with a chance of 3 in a million, and then one gets a number.
    """

    def __init__(self) -> None:
        self._sorted: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._recent: set[int] = set()
        self._next_number: dict[str, int] = {}

    def add(self, key: str) -> str:
        """Return the key itself the first time, with a number that no earlier key has afterwards."""
        unique = key
        while not self._remember(unique):
            number = self._next_number.get(key, 2)
            self._next_number[key] = number + 1
            unique = f"{key}#{number}"
        return unique

    def _remember(self, key: str) -> bool:
        digest = _hash64(key)
        if digest in self._recent:
            return False
        index = int(np.searchsorted(self._sorted, np.uint64(digest)))
        if index < len(self._sorted) and int(self._sorted[index]) == digest:
            return False
        self._recent.add(digest)
        if len(self._recent) >= max(_MERGE_AT, len(self._sorted) // 8):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return True


def printable(name: str) -> str:
    r"""Return a name as valid Unicode: bytes of it that are no UTF-8 are written as `\xff`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _hash64(key: str) -> int:
    # Python's own hash is salted anew in each process; the numbering must be the same in all of them.
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "little")
