"""The last step before a server's own program: runs in the child, as a script, and becomes the server by exec.

It owns what only the child itself can do: giving up root, and asking the kernel for a signal when the parent dies.
It is started as `python -I -S launch.py PARENT_PID SIGNAL ACCOUNT DIRECTORY PROGRAM ARGS...`, so that nothing of ours
runs between fork and exec in a process with threads. It imports the standard library only.

ACCOUNT is one of
    self        stay who we are
    namespace   become uid 1000 of a new user namespace, which is still root on disk: PostgreSQL refuses uid 0,
                and this way neither file owners nor the modes of parent directories have to change
    nobody      become uid and gid 65534
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

NOBODY = 65534
_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1


def become(account: str) -> None:
    """This process runs as `account`. Raises OSError when the system does not allow it."""
    if account == "namespace":
        _call("unshare", _CLONE_NEWUSER)
        # Without the right to set groups (it is lost with the new namespace) the kernel wants them frozen first.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text("1000 0 1")
        Path("/proc/self/gid_map").write_text("1000 0 1")
    elif account == "nobody":
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def die_with_parent(parent_pid: int, stop_signal: int) -> None:
    """The kernel sends `stop_signal` when the parent's thread that started us ends. Only Linux can do this.

    Comes after `become`, because a change of credentials clears the request.
    """
    if sys.platform != "linux":
        return
    _call("prctl", _PR_SET_PDEATHSIG, stop_signal)
    if os.getppid() != parent_pid:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def _call(name: str, *args: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def main(argv: list[str]) -> None:
    """Become the program of `argv`; ends with a line on stderr when that is not possible."""
    parent_pid, stop_signal, account, directory, *command = argv
    try:
        become(account)
        os.chdir(directory)
        die_with_parent(int(parent_pid), int(stop_signal))
        os.execv(command[0], command)
    except OSError as exc:
        sys.exit(f"cannot start {command[0]} as {account} in {directory}: {exc}")


if __name__ == "__main__":
    main(sys.argv[1:])
