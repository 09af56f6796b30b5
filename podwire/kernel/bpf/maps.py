"""Maps: create, open, read and write, one by one or in batches."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple

from podwire.errors import KernelError
from podwire.kernel.bpf.syscall import (
    Command,
    attr,
    bpf,
    bpf_errno,
    name_bytes,
    object_info,
)

_BATCH = 16384
_element = struct.Struct("=IxxxxQQQ")
_batch = struct.Struct("=QQQQIIQQ")


class MapType(IntEnum):
    """enum bpf_map_type, as far as it is used here."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    HASH_OF_MAPS = 13
    SK_STORAGE = 24
    RINGBUF = 27


class MapFlag(IntFlag):
    """Creation flags. NO_PREALLOC: memory follows the entries; INNER_MAP: sizes may differ."""

    NO_PREALLOC = 1
    INNER_MAP = 1 << 12


class MapInfo(NamedTuple):
    """struct bpf_map_info, its common head."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


class Map:
    """A map in the kernel, owned by this descriptor. Keys and values are packed bytes.

    `value_size` of per-CPU maps is that of one CPU; reading gives all CPUs' values, each padded to
    eight bytes, in one byte string.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.info = map_info(fd)
        stride = (self.info.value_size + 7) & ~7
        per_cpu = self.info.type in (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY)
        self._value_size = stride * _possible_cpus() if per_cpu else self.info.value_size

    @property
    def memory(self) -> int:
        """Bytes that the kernel has set aside, by its own account."""
        with open(f"/proc/self/fdinfo/{self.fd}") as file:
            facts = dict(line.split(":", 1) for line in file)
        return int(facts.get("memlock", "0"))

    @property
    def zero(self) -> bytes:
        """A value of zeros, for all CPUs of a per-CPU map."""
        return bytes(self._value_size)

    @classmethod
    def create(
        cls,
        type: MapType,
        key_size: int,
        value_size: int,
        max_entries: int,
        *,
        flags: int = 0,
        name: str = "",
    ) -> Map:
        """A new map without a pin. Raises KernelError."""
        head = struct.pack(
            "=IIIIIII16s",
            *(type, key_size, value_size, max_entries, flags, 0, 0, name_bytes(name)),
        )
        return cls(bpf(Command.MAP_CREATE, attr(72, head), f"cannot create map {name}"))

    @classmethod
    def by_id(cls, id: int) -> Map:
        return cls(bpf(Command.MAP_FD_BY_ID, attr(12, struct.pack("=I", id)), f"no map {id}"))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def lookup(self, key: bytes) -> bytes | None:
        """The value, or None. For a map of maps: the id of the inner map, packed."""
        value = ctypes.create_string_buffer(self._value_size)
        code = self._element(Command.MAP_LOOKUP, key, ctypes.addressof(value))
        if code == errno.ENOENT:
            return None
        self._check(code, "look-up")
        return value.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Write one entry, overwriting. Raises KernelError (E2BIG: full)."""
        buffer = ctypes.create_string_buffer(value, len(value))
        code = self._element(Command.MAP_UPDATE, key, ctypes.addressof(buffer))
        self._check(code, "update")

    def delete(self, key: bytes) -> bool:
        """Whether the entry was there."""
        code = self._element(Command.MAP_DELETE, key)
        if code == errno.ENOENT:
            return False
        self._check(code, "delete")
        return True

    def update_batch(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Write many entries, overwriting. Raises KernelError (E2BIG: full; earlier ones stay)."""
        keys, values = bytearray(), bytearray()
        for key, value in entries:
            keys += key
            values += value
        self.update_packed(bytes(keys), bytes(values))

    def update_packed(self, keys: bytes, values: bytes) -> None:
        """As `update_batch`, from one string of keys and one of values."""
        size = self.info.key_size
        for start in range(0, len(keys) // size, _BATCH):
            part = keys[start * size : (start + _BATCH) * size]
            data = values[start * self._value_size : (start + _BATCH) * self._value_size]
            _, code, done = self._run_batch(Command.MAP_UPDATE_BATCH, part, data)
            self._check(code, f"batch update after {start + done} entries")

    def delete_batch(self, keys: Sequence[bytes]) -> None:
        """Remove many entries; those that are missing are no error."""
        at = 0
        while at < len(keys):
            part = keys[at : at + _BATCH]
            _, code, done = self._run_batch(Command.MAP_DELETE_BATCH, b"".join(part), b"")
            if code not in (0, errno.ENOENT):
                self._check(code, "batch delete")
            at += len(part) if code == 0 else done + 1

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries, read in batches (map kinds without batches: key by key)."""
        if self.info.type in (MapType.ARRAY_OF_MAPS, MapType.HASH_OF_MAPS, MapType.PERCPU_ARRAY):
            yield from self._items_by_key()
            return
        key_size, value_size = self.info.key_size, self._value_size
        chunk = min(_BATCH, max(self.info.max_entries, 64))
        cursor = ctypes.create_string_buffer(max(key_size, 8))
        first = True
        while True:
            keys = ctypes.create_string_buffer(chunk * key_size)
            values = ctypes.create_string_buffer(chunk * value_size)
            after = ctypes.create_string_buffer(len(cursor))
            request = attr(
                _batch.size,
                _batch.pack(
                    0 if first else ctypes.addressof(cursor),
                    *(ctypes.addressof(after), ctypes.addressof(keys), ctypes.addressof(values)),
                    *(chunk, self.fd, 0, 0),
                ),
            )
            _, code = bpf_errno(Command.MAP_LOOKUP_BATCH, request)
            count = struct.unpack_from("=I", request, 32)[0]
            if code == errno.ENOSPC:  # one hash bucket is longer than the chunk
                chunk *= 2
                continue
            if code not in (0, errno.ENOENT):
                self._check(code, "batch look-up")
            key_bytes, value_bytes = keys.raw, values.raw
            for i in range(count):
                yield (
                    key_bytes[i * key_size : (i + 1) * key_size],
                    value_bytes[i * value_size : (i + 1) * value_size],
                )
            if code:
                return
            cursor, first = after, False

    def keys(self) -> Iterator[bytes]:
        """All keys, one system call each."""
        previous: bytes | None = None
        after = ctypes.create_string_buffer(self.info.key_size)
        while True:
            before = ctypes.create_string_buffer(previous or b"", self.info.key_size)
            request = attr(
                _element.size,
                _element.pack(
                    self.fd,
                    0 if previous is None else ctypes.addressof(before),
                    ctypes.addressof(after),
                    0,
                ),
            )
            if bpf_errno(Command.MAP_NEXT_KEY, request)[1]:
                return
            previous = after.raw
            yield previous

    def inner(self, key: bytes) -> Map | None:
        """The map that a map of maps holds under `key`, opened."""
        value = self.lookup(key)
        return Map.by_id(struct.unpack("=I", value)[0]) if value is not None else None

    def _items_by_key(self) -> Iterator[tuple[bytes, bytes]]:
        for key in self.keys():
            value = self.lookup(key)
            if value is not None:
                yield key, value

    def _element(self, command: Command, key: bytes, value: int = 0) -> int:
        if len(key) != self.info.key_size:
            raise ValueError(f"{self.info.name}: key of {len(key)}, not {self.info.key_size} bytes")
        buffer = ctypes.create_string_buffer(key, len(key))
        request = attr(_element.size, _element.pack(self.fd, ctypes.addressof(buffer), value, 0))
        return bpf_errno(command, request)[1]

    def _run_batch(self, command: Command, keys: bytes, values: bytes) -> tuple[int, int, int]:
        key_buffer = ctypes.create_string_buffer(keys, len(keys))
        value_buffer = ctypes.create_string_buffer(values, len(values)) if values else None
        request = attr(
            _batch.size,
            _batch.pack(
                *(0, 0, ctypes.addressof(key_buffer)),
                ctypes.addressof(value_buffer) if value_buffer is not None else 0,
                *(len(keys) // self.info.key_size, self.fd, 0, 0),
            ),
        )
        result, code = bpf_errno(command, request)
        return result, code, struct.unpack_from("=I", request, 32)[0]

    def _check(self, code: int, what: str) -> None:
        if code in (errno.E2BIG, errno.ENOSPC):  # what hashes and tries say
            raise KernelError(
                f"eBPF map {self.info.name} is full: it has room for {self.info.max_entries:,} "
                f"entries ({what})",
                errno=code,
            )
        if code:
            raise KernelError(f"eBPF map {self.info.name}: {what}: {os.strerror(code)}", errno=code)


def map_info(fd: int) -> MapInfo:
    """What the kernel says of a map."""
    *numbers, name = struct.unpack_from("=6I16s", object_info(fd, 88, "map"))
    return MapInfo(*numbers, name=name.rstrip(b"\0").decode())


def _possible_cpus() -> int:
    with open("/sys/devices/system/cpu/possible") as file:
        text = file.read().strip()
    return sum(
        int(last or first) - int(first) + 1
        for first, _, last in (part.partition("-") for part in text.split(","))
    )
