"""Compiled objects: what a `.o` says (`ObjectSpec`), and what the kernel made of it.

libbpf.so.1 (1.1 and later) reads the file, relocates for the running kernel (CO-RE), creates maps
and loads programs.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from podwire.errors import KernelError, Unsupported
from podwire.kernel.bpf.maps import Map
from podwire.kernel.bpf.programs import Program

_LOG_SIZE = 1 << 18
_BTF_DATASEC = 15
_Print = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class VerifierRejected(KernelError):
    """The kernel refused a program. `instruction` is the last one it looked at, `log` the end of
    its words."""

    def __init__(self, program: str, instruction: str, reason: str, log: str, code: int) -> None:
        at = f" at {instruction}" if instruction else ""
        super().__init__(f"program {program} is rejected{at}: {reason}", errno=code)
        self.program = program
        self.instruction = instruction
        self.reason = reason
        self.log = log


class LoadedObject:
    """Programs and maps in the kernel. Closing drops them unless links or pins hold them."""

    def __init__(self, programs: Mapping[str, Program], maps: Mapping[str, Map]) -> None:
        self.programs = programs
        self.maps = maps

    def close(self) -> None:
        for thing in (*self.programs.values(), *self.maps.values()):
            thing.close()

    def __enter__(self) -> LoadedObject:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ObjectSpec:
    """An opened file, not yet in the kernel: choose, set, then `load` once.

    Raises KernelError when the file is missing or no BPF object, Unsupported without libbpf.
    """

    def __init__(self, path: Path) -> None:
        lib = _libbpf()
        _messages.clear()
        self.path = path
        self._object = lib.bpf_object__open_file(str(path).encode(), None)
        if not self._object:
            code = ctypes.get_errno()
            words = "; ".join(_messages) or os.strerror(code)
            raise KernelError(f"cannot open {path}: {words}", errno=code)
        self._programs = _list(lib.bpf_object__next_program, self._object, lib.bpf_program__name)
        self._maps = _list(lib.bpf_object__next_map, self._object, lib.bpf_map__name)

    def __del__(self) -> None:
        if getattr(self, "_object", None):
            _libbpf().bpf_object__close(self._object)

    @property
    def programs(self) -> list[str]:
        return list(self._programs)

    @property
    def maps(self) -> list[str]:
        return list(self._maps)

    @property
    def constants(self) -> list[str]:
        """Names of the read-only variables."""
        return list(_variables(_libbpf().bpf_object__btf(self._object), ".rodata"))

    def only(self, programs: set[str]) -> None:
        """Load these programs and leave the others in the file."""
        for name, handle in self._programs.items():
            _libbpf().bpf_program__set_autoload(handle, name in programs)

    def set_max_entries(self, map: str, count: int) -> None:
        _check(_libbpf().bpf_map__set_max_entries(self._maps[map], count), f"size of map {map}")

    def use_map(self, name: str, map: Map) -> None:
        """Use an existing map instead of making one. Its sizes must be the file's."""
        _check(_libbpf().bpf_map__reuse_fd(self._maps[name], map.fd), f"reuse of map {name}")

    def set_constants(self, values: Mapping[str, bytes]) -> None:
        """Write read-only variables: the verifier removes the code that they switch off.

        Raises KeyError for a name that the file lacks.
        """
        if not values:
            return
        lib = _libbpf()
        size = ctypes.c_size_t()
        section = next((m for m in self._maps if m.endswith(".rodata")), None)
        if section is None:
            raise KeyError(f"{self.path.name} has no constants")
        data = lib.bpf_map__initial_value(self._maps[section], ctypes.byref(size))
        places = _variables(lib.bpf_object__btf(self._object), ".rodata")
        for name, value in values.items():
            offset, length = places[name]
            if len(value) != length:
                raise ValueError(f"constant {name} has {length} bytes, not {len(value)}")
            ctypes.memmove(data + offset, value, length)

    def load(self) -> LoadedObject:
        """Create the maps and load the programs. Raises VerifierRejected or KernelError."""
        lib = _libbpf()
        logs = {name: ctypes.create_string_buffer(_LOG_SIZE) for name in self._programs}
        for name, handle in self._programs.items():
            lib.bpf_program__set_log_buf(handle, logs[name], _LOG_SIZE)
        _messages.clear()
        code = -lib.bpf_object__load(self._object)
        if code:
            self._raise(
                code, {name: log.value.decode(errors="replace") for name, log in logs.items()}
            )
        programs = {
            name: Program(os.dup(fd))
            for name, handle in self._programs.items()
            if (fd := lib.bpf_program__fd(handle)) >= 0
        }
        maps = {
            name: Map(os.dup(fd))
            for name, handle in self._maps.items()
            if (fd := lib.bpf_map__fd(handle)) >= 0
        }
        lib.bpf_object__close(self._object)
        self._object = None
        return LoadedObject(programs, maps)

    def _raise(self, code: int, logs: Mapping[str, str]) -> None:
        # libbpf loads in order and stops at the first refusal; earlier programs leave no log
        failed = next((m for m in _messages if "failed to load" in m), "")
        for name, log in logs.items():
            if log and (not failed or f"'{name}'" in failed):
                instruction, reason = _explain(log)
                raise VerifierRejected(name, instruction, reason, log[-4000:], code)
        words = "; ".join(m for m in _messages[:4]) or os.strerror(code)
        raise KernelError(f"cannot load {self.path.name}: {words}", errno=code)


def _explain(log: str) -> tuple[str, str]:
    """The last instruction and the sentence after it, from a verifier log."""
    instruction, reason = "", "no reason given"
    for line in log.splitlines():
        if re.match(r"\d+: \(", line):
            instruction = line.split(";")[0].strip()
        elif line.strip() and not re.match(
            r"(processed \d+ insns|;|-- END|verification time|stack depth|\d+: R|from |arg#)", line
        ):
            reason = line.strip()
    return instruction, reason


def _variables(btf: int, section: str) -> dict[str, tuple[int, int]]:
    """``name: (offset, size)`` of the variables of a data section, from the object's BTF."""
    lib = _libbpf()
    id = lib.btf__find_by_name_kind(btf, section.encode(), _BTF_DATASEC)
    if id < 0:
        return {}
    head = lib.btf__type_by_id(btf, id)
    count = struct.unpack("=III", ctypes.string_at(head, 12))[1] & 0xFFFF
    out: dict[str, tuple[int, int]] = {}
    for type, offset, size in struct.iter_unpack("=III", ctypes.string_at(head + 12, 12 * count)):
        name_offset = struct.unpack("=I", ctypes.string_at(lib.btf__type_by_id(btf, type), 4))[0]
        out[lib.btf__name_by_offset(btf, name_offset).decode()] = (offset, size)
    return out


def _list(
    following: Callable[[int, int | None], int | None],
    object: int,
    name: Callable[[int], bytes],
) -> dict[str, int]:
    out: dict[str, int] = {}
    handle = following(object, None)
    while handle:
        out[name(handle).decode()] = handle
        handle = following(object, handle)
    return out


def _check(result: int, what: str) -> None:
    if result:
        raise KernelError(f"{what}: {os.strerror(-result)}", errno=-result)


_messages: list[str] = []
_libc = ctypes.CDLL(None)


@_Print
def _collect(level: int, template: bytes, arguments: int) -> int:
    """Keeps the warnings; of an object's load libbpf tells hundreds of lines besides."""
    if level != 0 or len(_messages) >= 50:
        return 0
    text = ctypes.create_string_buffer(2048)
    _libc.vsnprintf(text, len(text), template, ctypes.c_void_p(arguments))
    _messages.append(text.value.decode(errors="replace").strip().removeprefix("libbpf: ")[:300])
    return 0


def has_libbpf() -> bool:
    """Whether libbpf is installed here."""
    try:
        return bool(_libbpf())
    except Unsupported:
        return False


@cache
def _libbpf() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise Unsupported(f"libbpf.so.1 is missing ({error}): install libbpf1") from None
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for function, result, arguments in (
        ("bpf_object__open_file", pointer, [text, pointer]),
        ("bpf_object__load", number, [pointer]),
        ("bpf_object__close", None, [pointer]),
        ("bpf_object__btf", pointer, [pointer]),
        ("bpf_object__next_program", pointer, [pointer, pointer]),
        ("bpf_object__next_map", pointer, [pointer, pointer]),
        ("bpf_program__name", text, [pointer]),
        ("bpf_program__fd", number, [pointer]),
        ("bpf_program__set_autoload", number, [pointer, ctypes.c_bool]),
        ("bpf_program__set_log_buf", number, [pointer, pointer, ctypes.c_size_t]),
        ("bpf_map__name", text, [pointer]),
        ("bpf_map__fd", number, [pointer]),
        ("bpf_map__set_max_entries", number, [pointer, ctypes.c_uint32]),
        ("bpf_map__reuse_fd", number, [pointer, number]),
        ("bpf_map__initial_value", pointer, [pointer, pointer]),
        ("btf__find_by_name_kind", ctypes.c_int32, [pointer, text, ctypes.c_uint32]),
        ("btf__type_by_id", pointer, [pointer, ctypes.c_uint32]),
        ("btf__name_by_offset", text, [pointer, ctypes.c_uint32]),
        ("libbpf_set_print", pointer, [_Print]),
    ):
        entry = getattr(lib, function)
        entry.restype, entry.argtypes = result, arguments
    lib.libbpf_set_print(_collect)
    return lib
