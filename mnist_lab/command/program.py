"""`mnist-lab`, what `pip install` puts on the path: each script by a short name. Its help imports nothing slow."""

import ast
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

# By what is typed: the script that runs.
SCRIPTS = {
    "run": "run_all_experiments",
    "baseline": "baseline_mnist",
    "moe": "moe_mnist",
    "ptq": "ptq_mnist",
    "kd": "kd_mnist",
    "prune": "prune_mnist",
    "qat": "qat_mnist",
    "adapt": "adapt_mnist",
    "sweep": "sweep",
    "claims": "claims_mnist",
    "dark-knowledge": "dark_knowledge_mnist",
    "compare": "compare_onnx",
    "deploy": "deploy_mnist",
    "classify": "classify",
    "visualize": "visualize_results",
}


def main() -> None:
    """Run the script that the first argument names with the other arguments, as if it had been started itself."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in {"-h", "--help"}:
        print(usage())
    elif name not in SCRIPTS:
        print(f"error: there is no {name}; there are {', '.join(SCRIPTS)}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv[1:] = arguments
        runpy.run_module(SCRIPTS[name], run_name="__main__", alter_sys=True)


def usage() -> str:
    """What each script does, by the first sentence of its own text."""
    lines = [f"  {name:15} {_summary(module)}" for name, module in SCRIPTS.items()]
    return "\n".join(["usage: mnist-lab NAME [OPTIONS]", "", *lines, "", "mnist-lab NAME --help gives its options."])


def _summary(module: str) -> str:
    found = find_spec(module)
    assert found is not None
    assert found.origin is not None
    text = ast.get_docstring(ast.parse(Path(found.origin).read_text(encoding="utf-8")))
    return (text or "").splitlines()[0]
