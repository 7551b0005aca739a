"""How a script starts and ends: its options from a dataclass, its exit code from what happened. No torch here."""

import atexit
import gc
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mnist_lab.command.ending import Stopped, ignore_signals, why_failed
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.folders import own_temporary_folder
from mnist_lab.own_data import DATASET_TEXTS

T = TypeVar("T")
PIPE_CLOSED = 141  # as a shell gives it for a program that SIGPIPE ends


REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _one_of(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """An option of a Literal's values that may be left out: tyro alone would count `None` among them."""
    names, *rest = get_args(type_info.type) or (None,)
    if get_origin(names) is not Literal or rest != [NoneType]:
        return None
    choices = {str(value): value for value in get_args(names)}
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(choices)}}}",
        instance_from_str=lambda given: choices[given[0]],
        is_instance=lambda value: value is None or value in choices.values(),
        str_from_instance=lambda value: [str(value)],
        choices=tuple(choices),
    )


def _expand(given: list[str]) -> Path:
    try:
        return Path(given[0]).expanduser()
    except RuntimeError as error:  # no such user
        raise ValueError(f"{given[0]}: {error}") from error


# A path whose ~ is the user's home, also where no shell expands it.
Folder = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_expand,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    ),
]


# The name of a data set, or where own data lies; checked where it is loaded.
DatasetText = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(DATASET_TEXTS)}}}",
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]


def run_script(main: Callable[[T], None], options_type: type[T], description: str) -> NoReturn:
    """Parse the command line into `options_type`, call `main`, and leave with the suite's exit codes.

    The first paragraph of `description` heads the help. Exit codes: 0 done; 1 the run failed; 2 the user's input
    is wrong; 130 interrupted; 141 nobody reads the output any more; 143 terminated.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started the script
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± gets a question mark
    gc.freeze()  # what was imported stays, and need not be searched for garbage time and again
    try:
        summary = description.partition("\n\n")[0]
        config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
        options = tyro.cli(options_type, description=summary, config=config, registry=REGISTRY)
        with own_temporary_folder():
            main(options)
        sys.stdout.flush()
    except UserError as error:
        _leave(f"error: {error}", 2)
    except RunFailed as error:
        _leave(f"failed: {error}", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave("", PIPE_CLOSED)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        _leave(stopped.message, stopped.code)
    except Exception as error:
        reason = why_failed(error)
        if reason is None:
            raise
        _leave(f"failed: {reason}", 1)
    _leave("", 0)


def _leave(message: str, code: int) -> NoReturn:
    atexit.register(ignore_signals)
    try:
        sys.stdout.flush()
    except OSError:  # said already, or the reason of it all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        print(message, file=sys.stderr)
    gc.freeze()  # or the interpreter's end would take a second longer
    sys.exit(code)
