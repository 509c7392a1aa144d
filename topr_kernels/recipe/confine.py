"""Takes rights away from a process before it judges a model's answers.

Defence in depth, not a jail. On Linux (x86-64, aarch64) a seccomp filter has the kernel refuse to open a
file for writing, to change a folder, to make a socket, to start a process or a program, and to signal
another one. Elsewhere only Python's audit hook and the resource limits stand, and code that gets at the
interpreter's memory passes the hook. Nothing here stops reading: what this user may read, an executed
answer may read; its one way out is the verdict on itself.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Audit events that judging never needs; a name that ends in "." stands for all that begin with it.
_REFUSED = (
    *("ctypes.", "fcntl.", "ftplib.", "http.client.", "imaplib.", "pty.", "shutil.", "smtplib."),
    *("socket.", "sqlite3.", "subprocess.", "tempfile.", "urllib.", "webbrowser.", "winreg."),
    *("os.chflags", "os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.fwalk"),
    *("os.kill", "os.killpg", "os.link", "os.lockf", "os.mkdir", "os.posix_spawn", "os.remove"),
    *("os.removexattr", "os.rename", "os.rmdir", "os.setxattr", "os.spawn", "os.startfile"),
    *("os.symlink", "os.system", "os.truncate", "os.utime", "resource."),
    *("signal.pthread_kill", "syslog.syslog"),
)

# Numbers of the system calls, for x86-64 and aarch64; None where it has none.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    **{"socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425)},
    **{"clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None)},
    **{"execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "bpf": (321, 280)},
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)},
    **{"pidfd_open": (434, 434), "pidfd_send_signal": (424, 424)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
    # Limits and priorities of other processes.
    **{"prlimit64": (302, 261), "sched_setaffinity": (203, 122), "setpriority": (141, 140)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39)},
    # A file by its handle, opened past the flags that are looked at; a queue that outlives its maker.
    **{"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "mq_open": (240, 180)},
    **{"creat": (85, None), "openat2": (437, 437), "truncate": (76, 45), "ftruncate": (77, 46)},
    **{"rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276)},
    **{"mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None)},
    **{"unlink": (87, None), "unlinkat": (263, 35), "link": (86, None), "linkat": (265, 37)},
    **{"symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33)},
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16)},
    **{"setxattrat": (463, 463), "removexattrat": (466, 466), "shmget": (29, 194)},
    **{
        "utime": (132, None),
        "utimes": (235, None),
        "futimesat": (261, None),
        "utimensat": (280, 88),
    },
}
#: System calls whose flags say whether they write, and which argument holds the flags.
_OPENS: dict[str, tuple[int | None, int | None, int]] = {
    "open": (2, None, 1),
    "openat": (257, 56, 2),
}
#: Machine to its column of the tables above and the kernel's name for it (AUDIT_ARCH).
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


#: CAP_DAC_READ_SEARCH, as a bit: what root may read, workers may read.
_READING = 1 << 2


class RefusedError(PermissionError):
    """An operation that no scorer needs."""


def hide() -> None:
    """Closes this process, and those that it forks, to each other: none opens another's memory or pipes.

    They lie open in /proc for processes of one user. Root's capabilities pass what closes them, so all
    are given up but that of reading files.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # _LINUX_CAPABILITY_VERSION_3, and 0 for this process.
    head = ctypes.create_string_buffer(struct.pack("II", 0x20080522, 0))
    held = ctypes.create_string_buffer(24)
    if libc.capget(head, held) == 0:
        effective, permitted = struct.unpack("2I", held.raw[:8])
        libc.capset(head, struct.pack("6I", effective & _READING, permitted & _READING, 0, 0, 0, 0))
    # PR_SET_DUMPABLE
    libc.prctl(4, 0, 0, 0, 0)


def filters() -> bool:
    """Whether the kernel takes the filter of ``confine``, tried in a process that ends with it."""
    if sys.platform != "linux":
        return False
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = 0 if _filter_calls(ctypes.CDLL(None, use_errno=True)) else 1
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def confine(memory: int, refused: Callable[[str], object]) -> None:
    """Gives up for good all rights that judging an answer does not need.

    Args:
        memory: bytes that this process may allocate in addition to what it has.
        refused: called with the name of each operation that Python's audit hook refuses, since a scorer
            may catch the exception.
    """
    os.environ.clear()
    sys.dont_write_bytecode = True
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        # PR_SET_PDEATHSIG: the kernel ends this process with the one that forked it.
        libc.prctl(1, int(signal.SIGKILL), 0, 0, 0)
        _limit(resource.RLIMIT_AS, _address_space() + memory)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        # Last: it refuses the call that sets limits.
        _filter_calls(libc)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & _WRITING
            if not writes:
                return
        elif not any(
            event.startswith(name) if name[-1] == "." else event == name for name in _REFUSED
        ):
            return
        refused(event)
        raise RefusedError(f"{event}: not for the scorer of an answer")

    sys.addaudithook(audit)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _filter_calls(libc: Any) -> bool:
    """Has the kernel refuse the calls of the tables with EPERM; returns whether it could be set up."""
    if platform.machine() not in _MACHINES or sys.maxsize < 2**32:
        return False
    column, architecture = _MACHINES[platform.machine()]
    load, equal, least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050001)
    # Calls of other architectures and of x32, which have other numbers, are refused.
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), refuse, (load, 0, 0, 0)]
    code += [(least, 0, 1, 0x40000000), refuse]
    for numbers in _CALLS.values():
        if (number := numbers[column]) is not None:
            code += [(equal, 0, 1, number), refuse]
    for *pair, argument in _OPENS.values():
        if (number := pair[column]) is not None:
            # The number is read again behind a test of flags that did not end the program.
            code += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument)]
            code += [(any_bit, 0, 1, _WRITING), refuse, allow]
    code.append(allow)
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    # struct sock_fprog: the number of instructions, and where they are.
    head = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(program)))
    # PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP with SECCOMP_MODE_FILTER.
    done: bool = libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, head, 0, 0) == 0
    return done
