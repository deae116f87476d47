"""Filters in pcap's language, compiled by libpcap itself (see pcap-filter(7))."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Iterator

from netlab.kernel.packet_sockets import INSTRUCTION
from netlab.problems import Exit, NetlabError, Problem

_LIBRARIES = ("libpcap.so.0.8", "libpcap.so.1")  # Debian's name for it, and that of others
_ETHERNET = 1  # DLT_EN10MB
_OPTIMIZE = 1
_NETMASK_UNKNOWN = 0xFFFFFFFF


class _Program(ctypes.Structure):
    """What libpcap calls struct bpf_program."""

    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.c_void_p))


class _Header(ctypes.Structure):
    """What libpcap calls struct pcap_pkthdr."""

    _fields_ = (
        ("seconds", ctypes.c_long),
        ("microseconds", ctypes.c_long),
        ("kept", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
    )


class Filter:
    """A compiled filter.  It is taken with an `AF_PACKET` socket, or asked frame by frame.

    `snaplen` is how many bytes it keeps of a frame that matches.  NetlabError: exit 2 with
    libpcap's words if the text is no filter, exit 3 if libpcap is missing.
    """

    def __init__(self, text: str, snaplen: int) -> None:
        library = _libpcap()
        self._compiled = _Program()
        with _opened(library, snaplen) as handle:
            refused = library.pcap_compile(
                handle, ctypes.byref(self._compiled), text.encode(), _OPTIMIZE, _NETMASK_UNKNOWN
            )
            if refused:
                said = library.pcap_geterr(handle).decode(errors="replace")
                raise NetlabError(
                    Problem(
                        "bad-filter",
                        f'"{text}" is no filter: {said}',
                        hint="it is in pcap's language, such as `tcp port 80 and host 10.244.1.2`",
                    )
                )
        self._library = library
        weakref.finalize(self, library.pcap_freecode, ctypes.byref(self._compiled))

    @property
    def program(self) -> bytes:
        """The program of classic BPF."""
        size = self._compiled.length * INSTRUCTION.size
        return ctypes.string_at(self._compiled.instructions or 0, size)

    def matches(self, frame: bytes) -> bool:
        """Whether an Ethernet frame, of which nothing was cut off, matches."""
        header = _Header(kept=len(frame), length=len(frame))
        return bool(
            self._library.pcap_offline_filter(
                ctypes.byref(self._compiled), ctypes.byref(header), frame
            )
        )


@contextlib.contextmanager
def _opened(library: ctypes.CDLL, snaplen: int) -> Iterator[int]:
    handle = library.pcap_open_dead(_ETHERNET, snaplen)
    if not handle:
        raise MemoryError
    try:
        yield handle
    finally:
        library.pcap_close(handle)


@functools.cache
def _libpcap() -> ctypes.CDLL:
    for name in _LIBRARIES:
        with contextlib.suppress(OSError):
            return _declared(ctypes.CDLL(name))
    raise NetlabError(
        Problem(
            "libpcap-missing",
            "filters are compiled by libpcap, which is not here",
            hint="`sudo apt-get install libpcap0.8`; the package is called libpcap on Fedora, Arch "
            "and Alpine, libpcap1 on openSUSE",
        ),
        Exit.MACHINE,
    )


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of the functions that are called."""
    library.pcap_open_dead.argtypes = (ctypes.c_int, ctypes.c_int)
    library.pcap_open_dead.restype = ctypes.c_void_p
    library.pcap_close.argtypes = (ctypes.c_void_p,)
    library.pcap_geterr.argtypes = (ctypes.c_void_p,)
    library.pcap_geterr.restype = ctypes.c_char_p
    library.pcap_compile.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_uint32,
    )
    library.pcap_freecode.argtypes = (ctypes.c_void_p,)
    library.pcap_freecode.restype = None
    library.pcap_offline_filter.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
    return library
