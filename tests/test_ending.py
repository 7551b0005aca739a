"""How scripts end: signals, closed pipes, narrow encodings, too little of something. One line each."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
from dataclasses import dataclass
from mnist_lab.command.entry import run_script
@dataclass(frozen=True)
class Options:
    pass
def main(options):
    {body}
run_script(main, Options, "A script.")
"""


def start(body: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        errors="replace",
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "says", "code"), [("SIGINT", "interrupted", 130), ("SIGTERM", "terminated", 143)])
@pytest.mark.parametrize(
    "body",
    [
        "print('ready', flush=True); import time; time.sleep(30)",
        # An endless loop that swallows what it can.
        "print('ready', flush=True)\n    while True:\n        try:\n            import time; time.sleep(30)\n"
        "        except BaseException: pass",
        # A finalizer, in which Python swallows it.
        "import time\n    class A:\n        def __del__(self): print('ready', flush=True); time.sleep(30)\n"
        "    a = A(); del a; time.sleep(30)",
    ],
    ids=["sleeping", "swallowing", "finalizing"],
)
def test_signal_ends_a_script_within_seconds_and_one_line(number: str, says: str, code: int, body: str) -> None:
    process = start(body)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.Signals[number])
    start_s = time.monotonic()
    assert finish(process) == (code, "", f"{says}; finished models and rows are kept\n")
    assert time.monotonic() - start_s < 10  # three seconds where nothing else runs


def test_signal_during_the_imports_ends_a_script_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("print('ready', flush=True)\nimport time\nwhile True:\n  time.sleep(1)\n")
    process = subprocess.Popen(
        [sys.executable, "-c", "import mnist_lab.command, slow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "interrupted; finished models and rows are kept\n")


def test_closed_pipe_ends_a_script_quietly() -> None:
    process = start("[print('x' * 80) for _ in range(100_000)]")
    assert process.stdout is not None
    assert process.stdout.readline() == "x" * 80 + "\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_full_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(body="print('x')")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    assert (process.returncode, process.stderr) == (1, "failed: No space left on device\n")


def test_terminal_without_the_sign_gets_another_and_no_traceback() -> None:
    code, out, err = finish(start("print('±')", PYTHONIOENCODING="ascii"))
    assert (code, out, err) == (0, "?\n", "")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise MemoryError", "too little memory"),
        ("raise OSError(24, 'Too many open files', 'x.json')", "Too many open files: x.json"),
        ("raise RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory')", "too little memory"),
        ("raise RuntimeError('write: No space left on device')", "No space left on device"),
    ],
)
def test_what_the_system_does_not_give_is_one_line(body: str, says: str) -> None:
    assert finish(start(body)) == (1, "", f"failed: {says}\n")


def test_error_of_our_own_keeps_its_traceback() -> None:
    code, _, err = finish(start("raise ZeroDivisionError"))
    assert code == 1
    assert "Traceback" in err
