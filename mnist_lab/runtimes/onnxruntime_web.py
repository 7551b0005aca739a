"""ONNX Runtime for browsers, as the npm package has it: WebAssembly, embedded into a page that needs no network."""

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from mnist_lab.errors import UserError
from mnist_lab.files import first_line, read_bytes, reading, write_atomically

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web-{VERSION}.tgz"
# SHA-512 of the package, as the registry gives it.
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
ADDRESS = f"https://registry.npmjs.org/onnxruntime-web/-/{PACKAGE}"
CACHE = Path(".cache")
TIMEOUT_S = 300


class WebRuntime(NamedTuple):
    """What a page embeds."""

    version: str
    module: bytes  # JavaScript, an ES module that needs no other file
    wasm: bytes  # that it instantiates


def fetch_runtime() -> str | None:
    """Let npm put the package into `CACHE`, unless it is there; says in a line why it cannot.

    Raises:
        RunFailed: the cache cannot be written.
        UserError: the package in it is not the one.
    """
    if (CACHE / PACKAGE).exists():
        _read_package()
        return None
    npm = shutil.which("npm")
    if npm is None:
        return f"npm is not here to fetch it; put {ADDRESS} into {CACHE}/"
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--ignore-scripts", "--fetch-retries=0"]
        command += ["--pack-destination", folder]
        try:
            done = subprocess.run(
                command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"npm cannot fetch it: {first_line(error)}"
        fetched = Path(folder) / PACKAGE
        if done.returncode != 0 or not fetched.is_file():
            reason = next((line for line in done.stderr.splitlines() if "error" in line.lower()), "it made no file")
            return f"npm cannot fetch it: {reason.strip()}"
        content = fetched.read_bytes()
        if not _is_intact(content):
            return f"what npm fetched is not {PACKAGE}, by its SHA-512"
        write_atomically(CACHE / PACKAGE, lambda temporary: temporary.write_bytes(content))
    return None


def find_runtime() -> WebRuntime | None:
    """The runtime in the package in `CACHE`; None where it was not fetched.

    Raises:
        UserError: the package is not the one.
    """
    if not (CACHE / PACKAGE).exists():
        return None
    with reading(CACHE / PACKAGE, "Delete it."), tarfile.open(fileobj=io.BytesIO(_read_package())) as package:
        return WebRuntime(
            VERSION, _member(package, "ort.wasm.bundle.min.mjs"), _member(package, "ort-wasm-simd-threaded.wasm")
        )


def _read_package() -> bytes:
    content = read_bytes(CACHE / PACKAGE)
    if not _is_intact(content):
        raise UserError(f"{CACHE / PACKAGE} is not that package, by its SHA-512. Delete it.")
    return content


def _is_intact(content: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(content).digest()).decode() == INTEGRITY


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(f"package/dist/{name}")
    assert file is not None  # a regular file, by the digest of it all
    return file.read()
