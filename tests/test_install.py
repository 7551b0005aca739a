"""`pip install .`: one command that runs every script, from any folder."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from mnist_lab.command import program

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
QUICK = ["--dataset", "digits", "--recipe", "quick", "--epochs", "1", "--no-latency"]


def test_every_script_is_installed_and_has_a_name() -> None:
    scripts = sorted(path.stem for path in ROOT.glob("*.py"))
    assert PROJECT["tool"]["setuptools"]["py-modules"] == scripts
    assert sorted(program.SCRIPTS.values()) == scripts


def test_help_says_what_each_does_and_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['mnist-lab']; from mnist_lab.command.program import main; main(); "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit('torch' in sys.modules)"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in program.SCRIPTS:
        assert f"\n  {name} " in done.stdout
    assert "Train the dense FFN baseline" in done.stdout


def test_unknown_name_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist-lab", "train"])
    with pytest.raises(SystemExit) as exit_info:
        program.main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no train; there are run, baseline")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed package, built without network and without a trace in the project."""
    if find_spec("setuptools") is None or find_spec("pip") is None:
        pytest.skip("pip and setuptools are not in this environment")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)
    shutil.copytree(ROOT / "mnist_lab", source / "mnist_lab", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", ".", *options, "--target", str(site)],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return site


@pytest.mark.slow
class TestInstalled:
    def run(self, site: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [site / "bin" / "mnist-lab", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )

    def test_it_needs_what_requirements_name(self, site: Path) -> None:
        (metadata,) = site.glob("mnist_lab-*.dist-info/METADATA")
        text = metadata.read_text()
        assert "\nName: mnist-lab\n" in text
        for line in (ROOT / "requirements.txt").read_text().split():
            assert f"\nRequires-Dist: {line}\n" in text

    def test_no_module_is_missing(self, site: Path) -> None:
        installed = {path.relative_to(site) for path in (site / "mnist_lab").rglob("*.py")}
        assert installed == {path.relative_to(ROOT) for path in (ROOT / "mnist_lab").rglob("*.py")}

    def test_scripts_run_from_another_folder(self, site: Path, tmp_path: Path) -> None:
        assert "dark-knowledge" in self.run(site, tmp_path, "--help").stdout
        assert "--hidden" in self.run(site, tmp_path, "baseline", "--help").stdout
        done = self.run(site, tmp_path, "baseline", *QUICK)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "checkpoints" / "digits-compact-quick" / "FFN_baseline-epochs1-seed0.onnx").is_file()
        done = self.run(site, tmp_path, "ptq", *QUICK[:4], "--source", "FFN_baseline-epochs1", "--no-latency")
        assert done.returncode == 0, done.stderr
        assert "FFN_PTQ_INT8-epochs1" in done.stdout

    def test_exit_codes_are_the_scripts(self, site: Path, tmp_path: Path) -> None:
        done = self.run(site, tmp_path, "moe", *QUICK, "--learning-rate", "0")
        assert (done.returncode, "--learning-rate 0.0" in done.stderr) == (2, True)
        assert "Traceback" not in done.stderr
