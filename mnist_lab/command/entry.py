"""How a script starts and ends: its options from a dataclass, its exit code from what happened. No torch here."""

import gc
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, get_args

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from mnist_lab.errors import RunFailed, UserError

T = TypeVar("T")


def one_of(names: Any) -> PrimitiveConstructorSpec[Any]:
    """An option of a Literal's names that may be left out: tyro alone would count `None` among the names."""
    choices: tuple[str, ...] = get_args(names)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(choices)}}}",
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: value is None or value in choices,
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


def run_script(main: Callable[[T], None], options_type: type[T], description: str) -> NoReturn:
    """Parse the command line into `options_type`, call `main`, and leave with the suite's exit codes.

    The first paragraph of `description` heads the help. Exit codes: 0 done; 1 the run failed; 2 the user's input
    is wrong; 130 interrupted.
    """
    gc.freeze()  # what was imported stays, and need not be searched for garbage time and again
    try:
        summary = description.partition("\n\n")[0]
        main(tyro.cli(options_type, description=summary, config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)))
    except UserError as error:
        _leave(f"error: {error}", 2)
    except RunFailed as error:
        _leave(f"failed: {error}", 1)
    except KeyboardInterrupt:
        _leave("interrupted; finished models and rows are kept", 130)
    _leave("", 0)


def _leave(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    if message:
        print(message, file=sys.stderr)
    gc.freeze()  # or the interpreter's end would take a second longer
    sys.exit(code)
