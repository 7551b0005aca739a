"""How a script ends when it is not done: by a signal, or because the system gives no more. Imports nothing slow."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from mnist_lab.errors import why_exhausted

GRACE_S = 2.0  # to put things in order after a signal, before the process ends anyway
ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
KEPT = "finished models and rows are kept"


class Stopped(KeyboardInterrupt):
    """A signal asks the script to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number
        self.message = f"{ENDINGS[signal.Signals(number)]}; {KEPT}"


def handle_endings() -> None:
    """End by Ctrl-C or SIGTERM within seconds, and on too little memory, with one line each; also while importing.

    A process that ignores a signal, as one in the background does, goes on ignoring it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    try:
        Path.cwd()
    except OSError as error:  # which libraries would not survive
        leave_at_once(f"failed: the current folder is gone ({error.strerror})", 1)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)
    sys.excepthook = _print_uncaught
    sys.unraisablehook = _raise_again


def _stop(number: int, frame: FrameType | None) -> None:
    stopped = Stopped(number)
    if _is_importing(frame):  # which may swallow any exception, and has nothing to put in order
        leave_at_once(stopped.message, stopped.code)
    timer = threading.Timer(GRACE_S, leave_at_once, (stopped.message, stopped.code))
    timer.daemon = True
    timer.start()
    raise stopped


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def ignore_signals() -> None:
    """What is done ends by itself."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)


def leave_at_once(message: str, code: int) -> NoReturn:
    """End the process without unwinding it."""
    os.write(2, f"{message}\n".encode(errors="replace"))
    os._exit(code)


def _raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """A signal's exception that fell into a callback or a finalizer, which swallow what is raised, comes once more."""
    stopped = unraisable.exc_value
    if isinstance(stopped, Stopped):
        timer = threading.Timer(0.05, signal.raise_signal, (stopped.code - 128,))
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


def _print_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What happens before a script's own handling: one line where the cause is the system's, else a traceback."""
    reason = why_failed(error)
    if reason is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"failed: {reason}", file=sys.stderr)


def why_failed(error: BaseException) -> str | None:
    """The reason in one line, where an error or one behind it is the system's and not the suite's own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror}{f': {cause.filename}' if cause.filename else ''}"
        if (reason := why_exhausted(cause)) is not None:
            return reason
        cause = cause.__cause__
    return None
