"""A timer of one thread's processor time whose signal the kernel handles: Python has timers of the process alone."""

import ctypes
import os

_CLOCK_THREAD_CPUTIME_ID = 3


class _Event(ctypes.Structure):
    """`struct sigevent` for a signal to the process (SIGEV_SIGNAL is 0)."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


class _Times(ctypes.Structure):
    """`struct itimerspec`, of which nothing is repeated."""

    _fields_ = (
        ("every_seconds", ctypes.c_long),
        ("every_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class ThreadTimer:
    """Sends the process a signal when the thread that made the timer has worked for a time, if it is set."""

    def __init__(self, signal_number: int) -> None:
        """Raises OSError where the system has no such timers."""
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            create, self._set_time = libc.timer_create, libc.timer_settime
        except AttributeError as error:
            raise OSError("the C library has no timer_create") from error
        self._timer = ctypes.c_void_p()
        event = _Event(signo=signal_number)
        if create(_CLOCK_THREAD_CPUTIME_ID, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def set(self, seconds: float) -> None:
        """Starts it anew; 0 stops it."""
        whole = int(seconds)
        times = _Times(0, 0, whole, int((seconds - whole) * 1e9))
        self._set_time(self._timer, 0, ctypes.byref(times), None)
