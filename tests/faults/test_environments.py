"""Bad input and odd environments: the right exit code, and the cause in one line."""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from faults.scripts import QUICK, ROOT, fork_script, preload
from faults.test_damage import IS_LONG

BASELINE = ("baseline_mnist.py", *QUICK)
SHELL = "bash" if shutil.which("bash") else "sh"


@dataclass(frozen=True)
class Case:
    """A command in an environment, and how it ends."""

    name: str
    command: str  # for the shell: $P is Python, $S the folder of the scripts, $Q the options of a quick run
    code: int = 0
    says: str = ""  # in what it prints
    variables: dict[str, str] = field(default_factory=dict)


BASE = "$P $S/baseline_mnist.py $Q"
CASES = [
    # What is printed where, and how
    Case("ASCII", BASE, says="in %, ? 95 %", variables={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    Case("Latin-1", BASE, variables={"PYTHONIOENCODING": "latin-1"}),
    Case("no locale", BASE, variables={"LC_ALL": "xx_YY.UTF-9"}),
    Case("head", f"{BASE} | head -1; exit ${{PIPESTATUS[0]}}", code=141),
    Case("full output", f"{BASE} > /dev/full", code=1, says="No space left on device"),
    Case("closed output", f"{BASE} >&-"),
    Case("closed errors", f"{BASE} 2>&-"),
    Case("closed input", f"{BASE} <&-"),
    Case("all closed", f"{BASE} <&- >&- 2>&-"),
    Case("prompt without input", "$P $S/run_all_experiments.py $Q <&-", code=2, says="--mode"),
    Case("prompt at the end of input", "$P $S/run_all_experiments.py $Q < /dev/null", code=2, says="--mode"),
    Case("prompt with nonsense", "yes | $P $S/run_all_experiments.py $Q; exit ${PIPESTATUS[1]}", code=2, says="--mode"),
    Case("prompt with bytes", "head -c 3000 /dev/urandom | $P $S/run_all_experiments.py $Q", code=2, says="--mode"),
    Case("colours", BASE, variables={"FORCE_COLOR": "1"}),
    Case("no colours", BASE, variables={"NO_COLOR": "1"}),
    Case("dumb terminal", BASE, variables={"TERM": "dumb"}),
    Case("no terminal type", f"env -u TERM {BASE}"),
    Case("narrow", BASE, variables={"COLUMNS": "1"}),
    Case("nonsense width", BASE, variables={"COLUMNS": "wide", "LINES": "-3"}),
    Case("tty compatible", BASE, variables={"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}),
    Case("unbuffered", BASE, variables={"PYTHONUNBUFFERED": "1"}),
    Case("development mode", BASE, variables={"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "ignore"}),
    Case("warnings are errors", "$P -W error::UserWarning $S/baseline_mnist.py $Q"),
    Case("optimised", "$P -O $S/baseline_mnist.py $Q"),
    Case("other hash seed", BASE, variables={"PYTHONHASHSEED": "7"}),
    Case("safe path", "PYTHONPATH=$S $P -P $S/baseline_mnist.py $Q"),
    # Figures
    Case(
        "Jupyter's backend",
        "$P $S/visualize_results.py --results $D/r",
        says="plot:",
        variables={"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    ),
    Case(
        "no such backend",
        "$P $S/visualize_results.py --results $D/r",
        says="plot:",
        variables={"MPLBACKEND": "nonsense"},
    ),
    Case("TeX", "echo 'text.usetex: True' > matplotlibrc; $P $S/visualize_results.py --results $D/r", says="plot:"),
    Case(
        "broken settings",
        "echo 'figure.dpi: many' > matplotlibrc; $P $S/visualize_results.py --results $D/r",
        says="plot:",
    ),
    Case(
        "binary settings",
        "head -c 99 /dev/urandom > matplotlibrc; $P $S/visualize_results.py --results $D/r",
        code=1,
        says="matplotlibrc",
    ),
    Case(
        "no folder for settings",
        "$P $S/visualize_results.py --results $D/r",
        says="plot:",
        variables={"MPLCONFIGDIR": "/proc/nowhere"},
    ),
    Case("no results", "$P $S/visualize_results.py --results nowhere", code=2, says="nowhere"),
    Case("results is a file", "touch f; $P $S/visualize_results.py --results f", code=2, says="no records"),
    Case(
        "results of another recipe",
        "$P $S/visualize_results.py --results $D/r --recipe best",
        code=2,
        says="--recipe best",
    ),
    # Folders
    Case(
        "home",
        f"export HOME=$PWD/home; mkdir home; {BASE} '--checkpoints=~/c' '--results=~/r'; "
        "ls home/c/digits-compact-quick > /dev/null && [ ! -e '~' ]",
    ),
    Case("no home", f"env -u HOME {BASE}"),
    Case("nobody's home", f"{BASE} '--checkpoints=~nosuchuser/c'", code=2, says="nosuchuser"),
    Case("home does not exist", BASE, variables={"HOME": "/nonexistent"}),
    Case("unwritable folder", f"{BASE} --checkpoints /proc/x", code=2, says="cannot write to /proc/x"),
    Case("folder is a file", f"touch f; {BASE} --results f", code=2, says="cannot write to f"),
    Case("folder below a file", f"touch f; {BASE} --results f/g", code=2, says="cannot write to f/g"),
    Case("folder is null", f"{BASE} --results /dev/null", code=2, says="/dev/null"),
    Case("name too long", f"{BASE} --results $(printf 'x%.0s' $(seq 300))", code=2, says="too long"),
    Case("empty name", f"{BASE} --results ''"),
    Case("blanks and signs", f"{BASE} --results 'a b/ü±\"'"),
    Case("bytes that are no text", f"{BASE} --results $'a\\xff'"),
    Case("link to itself", f"ln -s loop loop; {BASE} --results loop", code=2, says="loop"),
    Case("dangling link", f"ln -s nowhere dangling; {BASE} --results dangling/x", code=2, says="dangling/x"),
    Case(
        "no current folder",
        f"mkdir gone; cd gone; rmdir ../gone; {BASE} --checkpoints $D/c2 --results $D/r2",
        code=1,
        says="the current folder is gone",
    ),
    Case("unwritable current folder", f"cd /proc; {BASE}", code=2, says="cannot write"),
    Case("umask", f'umask 077; {BASE}; [ "$(stat -c %a checkpoints/*/*.onnx)" = 600 ]'),
    Case("open umask", f'umask 0; {BASE}; [ "$(stat -c %a checkpoints/*/*.onnx)" = 666 ]'),
    # Temporary files
    Case("no temporary folder", BASE, variables={"TMPDIR": "/nonexistent"}),
    Case("temporary folder is a file", f"touch f; TMPDIR=$PWD/f {BASE}"),
    Case("relative temporary folder", f'mkdir t; TMPDIR=t {BASE}; [ -z "$(ls t)" ]'),
    # Machine
    Case("one CPU", f"taskset -c 0 {BASE} --threads 1"),
    Case("more threads than CPUs", f"taskset -c 0 {BASE} --threads 2", code=2, says="--threads 2"),
    Case("one OpenMP thread", BASE, says="1 training threads", variables={"OMP_NUM_THREADS": "1"}),
    Case("many OpenMP threads", BASE, variables={"OMP_NUM_THREADS": "64"}),
    Case("nonsense OpenMP threads", BASE, variables={"OMP_NUM_THREADS": "many"}),
    Case("no graphics card", BASE, variables={"CUDA_VISIBLE_DEVICES": ""}),
    Case("graphics card that is not there", f"{BASE} --device cuda:7", code=2, says="--device cuda:7"),
    Case("lowest priority", f"nice -n 19 {BASE}"),
    Case("in the background", f"nohup {BASE} > log 2>&1 & wait $!"),
    Case(
        "no compiler",
        f"{BASE} --runtime torch-compile onnxruntime",
        says="is skipped",
        variables={"CXX": "nosuchcompiler"},
    ),
    Case(
        "broken compiler", f"{BASE} --runtime torch-compile onnxruntime", says="is skipped", variables={"CXX": "false"}
    ),
    Case(
        "only what cannot run",
        f"{BASE} --runtime torch-compile",
        code=2,
        says="nothing is left",
        variables={"CXX": "false"},
    ),
    # Data
    Case("no data, named", "$P $S/baseline_mnist.py --dataset mnist --data-dir nowhere", code=2, says="nowhere"),
    Case(
        "variable names no folder",
        "$P $S/baseline_mnist.py --dataset mnist",
        code=2,
        says="MNIST_LAB_DATA",
        variables={"MNIST_LAB_DATA": "/nowhere"},
    ),
    Case(
        "variable names a file",
        "$P $S/baseline_mnist.py",
        code=2,
        says="MNIST_LAB_DATA",
        variables={"MNIST_LAB_DATA": "/dev/null"},
    ),
    Case("empty folder", "mkdir e; $P $S/baseline_mnist.py --data-dir e", code=2, says="--data-dir e"),
    Case("folder of digits", "$P $S/baseline_mnist.py --dataset digits --data-dir .", code=2, says="--data-dir"),
    Case(
        "packed",
        "mkdir -p e/MNIST/raw; for n in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; "
        "do echo x > e/MNIST/raw/$n-ubyte.gz; done; $P $S/baseline_mnist.py --data-dir e",
        code=2,
        says="gunzip",
    ),
    Case(
        "pipe for a file",
        "mkdir -p e/MNIST/raw; cd e/MNIST/raw; mkfifo train-images-idx3-ubyte; "
        "touch train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte; "
        "cd ../../..; $P $S/baseline_mnist.py --data-dir e",
        code=2,
        says="train-images-idx3-ubyte",
    ),
    Case("INT8 before the model", "$P $S/ptq_mnist.py $Q", code=2, says="baseline_mnist.py"),
    Case("student before the teacher", "$P $S/kd_mnist.py $Q", code=2, says="moe_mnist.py"),
    Case(
        "calibration beyond the data",
        f"{BASE} && $P $S/ptq_mnist.py $Q --calibration-size 5000",
        code=2,
        says="--calibration-size 5000",
    ),
    Case(
        "seed beyond the last",
        "$P $S/run_all_experiments.py $Q --mode load --seed 4294967295 --seeds 2",
        code=2,
        says="4294967295",
    ),
    Case(
        "seeds without end",
        "$P $S/run_all_experiments.py $Q --mode load --seeds 1000000000",
        code=2,
        says="--seeds 1000000000",
    ),
    Case("claims without end", "$P $S/claims_mnist.py $Q --seeds 1000000000", code=2, says="--seeds 1000000000"),
    Case("unknown option", f"{BASE} --speed 9", code=2, says="--speed"),
    Case("option without a value", "$P $S/baseline_mnist.py --seed", code=2, says="--seed"),
    Case("help", "$P $S/baseline_mnist.py --help", says="--seed INT"),
    Case(
        "router that does not learn",
        "$P $S/moe_mnist.py $Q --top-k 1 --gate chosen --balance none",
        says="does not learn",
    ),
    Case("one expert", "$P $S/moe_mnist.py $Q --num-experts 1 --top-k 1", says="Sparse_MoE-E1-K1"),
]


@pytest.fixture(scope="module")
def results() -> Iterator[Path]:
    """A folder with the records of a run, to draw."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [
                sys.executable,
                ROOT / BASELINE[0],
                *BASELINE[1:],
                "--checkpoints",
                folder / "c",
                "--results",
                folder / "r",
            ],
            check=True,
            capture_output=True,
        )
        yield folder


@pytest.mark.parametrize("case", CASES[:: 1 if IS_LONG else 12], ids=lambda case: case.name)
def test_environment(results: Path, tmp_path: Path, case: Case) -> None:
    shutil.copytree(results, tmp_path / "drawn")
    folder = tmp_path / "here"
    folder.mkdir()
    variables = {"P": sys.executable, "S": str(ROOT), "Q": " ".join(QUICK), "D": str(tmp_path / "drawn")}
    inherited = {name: value for name, value in os.environ.items() if name not in {"OMP_NUM_THREADS", "MNIST_LAB_DATA"}}
    done = subprocess.run(
        ["bash", "-c", case.command],
        cwd=folder,
        env=inherited | {"TMPDIR": str(tmp_path)} | case.variables | variables,
        capture_output=True,
        timeout=200,
    )
    output, errors = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert done.returncode == case.code, errors[-2000:] + output[-500:]
    assert "Traceback" not in errors, errors[-2000:]
    assert case.says in output + errors, errors[-1000:] + output[-1000:]
    assert "\x1b[" not in output
    if case.code:
        lines = errors.strip().splitlines()
        is_box = lines and lines[-1].startswith("╰")
        assert is_box or case.code == 141 or lines[-1].startswith(("error: ", "failed: ")), errors[-1000:]


NUMBERS = ["", "abc", "nan", "inf", "-1", "0", "1.5", "1e400", "99999999999999999999", "0x10", "1,5", "None"]
NAMES = ["", "abc", "None", "MNIST", "mnist digits", "../mnist"]
OPTIONS = {
    "baseline_mnist": {
        "--epochs": NUMBERS,
        "--batch-size": NUMBERS,
        "--learning-rate": ["", "abc", "nan", "inf", "-1", "0", "1e400", "None"],
        "--seeds": NUMBERS,
        "--hidden": ["abc", "0", "-1", "1.5", "10001", "99999999999999999999", "None"],
        "--log": NAMES,
        "--threads": NUMBERS,
        "--dataset": [*NAMES, "folder:", "folder:nowhere", "folder:/proc/self", "csv:/dev/zero", "idx:/dev/null"],
        "--image-size": [*NUMBERS, "28", "3", "257"],
        "--preset": NAMES,
        "--recipe": NAMES,
        "--runtime": NAMES,
        "--device": ["", "abc", "meta", "cuda:x"],
    },
    "moe_mnist": {
        "--num-experts": NUMBERS,
        "--top-k": [*NUMBERS[:5], "5"],
        "--balance": NAMES,
        "--balance-weight": ["", "abc", "nan", "inf", "-1"],
        "--capacity-factor": ["abc", "nan", "inf", "-1", "0"],
        "--gate": NAMES,
        "--model-width": NUMBERS,
        "--expert-width": [*NUMBERS, "2", "4100"],
    },
    "kd_mnist": {
        "--temperature": ["", "abc", "nan", "inf", "-1", "0", "1e7"],
        "--alpha": ["abc", "nan", "-0.1", "1.1"],
        "--teacher": NAMES,
        "--student": NAMES,
        "--pool": NUMBERS,
        "--hidden": ["", "abc", "0", "-1"],
        "--windows": ["", "abc", "8x5", "8x5s0", "0x5s2", "99x99s1", "9999999999x1s1"],
        "--student-experts": NUMBERS,
        "--student-width": NUMBERS,
        "--router-weight": ["", "abc", "nan", "inf", "-1"],
        "--experts-weight": ["", "abc", "nan", "inf", "-1"],
        "--data": NAMES,
        "--num-images": ["", "abc", "1"],
        "--ensemble-size": NUMBERS,
    },
    "ptq_mnist": {
        "--calibration-size": NUMBERS,
        "--calibration-method": NAMES,
        "--model": NAMES,
        "--source": [*NAMES, "FFN_baseline", "*", "a/b", "é"],
        "--mode": NAMES,
        "--target-cpu": NAMES,
    },
    "qat_mnist": {"--source": NAMES, "--bits": NAMES, "--model": NAMES},
    "run_all_experiments": {
        "--seeds": NUMBERS,
        "--mode": NAMES,
        "--seed": ["", "abc", "nan", "-1", "1.5", "4294967296"],
        "--suite": NAMES,
        "--pipeline": [
            "",
            ">",
            "moe",
            "abc",
            "neurons 1.5",
            "qat 5",
            "int8 > qat",
            "small",
            "w8",
            "w99x99s1 > qat",
            "é > 日",
        ],
    },
    "claims_mnist": {"--suite": NAMES, "--seeds": NUMBERS, "--runtime": ["pytorch", "abc"]},
    "dark_knowledge_mnist": {"--seeds": NUMBERS, "--epochs": NUMBERS, "--device": ["abc"]},
    "sweep": {
        "--seeds": ["", "abc", "3-1", "-1", "0-4294967296", "1.5", "1,,2"],
        "--num-experts": ["abc", "0", "4,0", "4,", "1.5", "99999999999999999999"],
        "--top-k": ["0", "8", "2,abc"],
        "--temperature": ["3", "nan"],
        "--model": NAMES,
        "--balance": NAMES,
        "--workers": NUMBERS,
        "--train-threads": NUMBERS,
        "--cluster": ["", "abc", "tcp://", "tcp://127.0.0.1:1", "nowhere://x"],
    },
    "visualize_results": {"--preset": NAMES, "--recipe": NAMES, "--dataset": NAMES},
    "compare_onnx": {
        "--layout": NAMES,
        "--scale": NUMBERS,
        "--mean": ["", "abc", "nan", "inf"],
        "--std": ["", "abc", "nan", "inf", "-1", "0"],
        "--beside": NAMES,
        "--threads": NUMBERS,
    },
}
FILES = {"compare_onnx": ["x.onnx"]}
BAD = [(script, option, value) for script, of in OPTIONS.items() for option, values in of.items() for value in values]


@pytest.mark.parametrize(("script", "option", "value"), BAD[:: 1 if IS_LONG else 20])
def test_bad_value(tmp_path: Path, script: str, option: str, value: str) -> None:
    preload()
    quick = () if script in {"dark_knowledge_mnist", "visualize_results", *FILES} else QUICK
    pairs = [pair for pair in zip(quick[::2], quick[1::2], strict=True) if pair[0] != option]
    arguments = [*FILES.get(script, []), *itertools.chain(*pairs), f"{option}={value}"]
    started = fork_script(script, arguments, tmp_path, tmp_path / "log")
    code = started.wait(60)
    started.end()
    log = started.log.read_text(errors="replace")
    assert code == 2, log
    assert "Traceback" not in log
    assert option in log, log
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
