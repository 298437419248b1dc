"""Versions of the adapter: who holds which, and what a node lacks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Array


def version_of(tensors: Mapping[str, Array]) -> str:
    """Name the version that these tensors are: a digest of all names, shapes and values.

    Two adapters have the same version only if they are equal bit for bit, on whatever machine
    and in whatever run they came about, so a version that matches needs no further trust.
    """
    return _version({name: _digest(name, array) for name, array in tensors.items()})


class VersionBook:
    """The server's record of the versions so far, and of the one that each tensor is from.

    Its size does not grow with the number of nodes, and by one short line a version.
    """

    def __init__(self) -> None:
        self.current = ""
        self._seen: dict[str, tuple[Array, bytes]] = {}
        self._changed: dict[str, int] = {}
        self._numbers: dict[str, int] = {}

    def advance(self, tensors: Mapping[str, Array]) -> str:
        """Take note of the adapter as it is now; the same tensors are the same version."""
        digests = {}
        for name, array in tensors.items():
            known = self._seen.get(name)
            # The very same object was digested before.
            digests[name] = known[1] if known and known[0] is array else _digest(name, array)
        version = _version(digests)
        if version != self.current:
            if not self._changed.keys() <= tensors.keys():
                # A name is gone: no node can be told so but by sending everything.
                self._numbers.clear()
                self._changed = {n: 0 for n in self._changed if n in tensors}
            number = 1 + max(self._numbers.values(), default=-1)
            for name, digest in digests.items():
                if name not in self._seen or self._seen[name][1] != digest:
                    self._changed[name] = number
            self._numbers[version] = number
            self.current = version
        self._seen = {name: (array, digests[name]) for name, array in tensors.items()}
        return version

    def lacking(self, held: str) -> tuple[str, ...] | None:
        """Names of the tensors that changed since version ``held``; ``None`` if it is unknown."""
        number = self._numbers.get(held)
        if number is None:
            return None
        return tuple(name for name in self._seen if self._changed[name] > number)

    def state_dict(self) -> dict[str, Any]:
        """All that cannot be told from the tensors."""
        return {"changed": dict(self._changed), "numbers": dict(self._numbers)}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
        """Go on from :meth:`state_dict`, with the tensors of the newest version.

        Raises
        ------
        ValueError
            If the tensors are of no version in the state.
        """
        digests = {name: _digest(name, array) for name, array in tensors.items()}
        version = _version(digests)
        if version not in state["numbers"] or set(state["changed"]) != set(tensors):
            raise ValueError("the tensors are not of the version that the state belongs to")
        self.current = version
        self._changed = dict(state["changed"])
        self._numbers = dict(state["numbers"])
        self._seen = {name: (array, digests[name]) for name, array in tensors.items()}


def _digest(name: str, array: Array) -> bytes:
    text = f"{name}\0{array.dtype}\0{tuple(array.shape)}\0{array.stype}\0"
    return hashlib.sha256(text.encode() + array.data).digest()


def _version(digests: Mapping[str, bytes]) -> str:
    joined: Iterable[bytes] = (digests[name] for name in sorted(digests))
    return hashlib.sha256(b"".join(joined)).hexdigest()[:32]
