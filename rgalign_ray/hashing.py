"""Numbers that belong to ids: the same on every machine, in whatever batch, part or order they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def hashes(texts: Iterable[str]) -> np.ndarray:
    """uint64 [B], of the first 8 bytes of BLAKE2b. Two of ten million texts meet with a chance of 3 in a million."""
    return np.frombuffer(b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in texts), dtype="<u8")


def session_keys(ids: Iterable[str]) -> np.ndarray:
    """int64 [B], non-negative 63-bit hashes of session ids."""
    return (hashes(ids) >> np.uint64(1)).astype(np.int64)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, a bijection of uint64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def mixed(keys: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """uint64 [n], a hash of (seed, purpose, key)."""
    salt = np.uint64(int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little"))
    return splitmix64(keys.astype(np.uint64) ^ salt)


def uniform(keys: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """float64 [n] in [0, 1), a hash of (seed, purpose, key): the same wherever a session is held."""
    return (mixed(keys, seed, purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53
