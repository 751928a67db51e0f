"""Build the release's files, and try the wheel where there is no compiler.

    python .ci/wheel.py OUT

The source distribution is built twice and must be the same bytes. The wheel is built from it, is
given the oldest Linux tag that its symbols allow (auditwheel), and is installed in an environment
that finds no compiler. The compiled module's tests and a build and an explanation run there.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/test_core_module.py", "tests/search", "tests/explain/test_explainer.py")


def run(*command: str | Path, **options: object) -> None:
    """Run a command, shown on stdout; CalledProcessError where it fails."""
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def build(kind: str, source: Path, out: Path) -> Path:
    """Build the sdist or the wheel of a tree, and return its file."""
    out.mkdir()
    tools = (sys.executable, "-P", "-m", "build", "--no-isolation", f"--{kind}")
    run(*tools, "--outdir", out, source)
    (made,) = out.iterdir()
    return made


def same_sdist(folder: Path) -> Path:
    """The source distribution; SystemExit where two builds of it differ."""
    first, second = (build("sdist", ROOT, folder / name) for name in ("first", "second"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
    if digests[0] != digests[1]:
        raise SystemExit(f"two builds of {first.name} differ: {digests[0]}, {digests[1]}")
    print(f"{first.name}: sha256 {digests[0]}, twice")
    return first


def unpacked(sdist: Path, folder: Path) -> Path:
    """The tree in a source distribution."""
    run("tar", "-xf", sdist, "-C", folder)
    return folder / sdist.name.removesuffix(".tar.gz")


def without_compiler(wheel: Path, tree: Path, folder: Path) -> None:
    """Install the wheel in a new environment, and run its tests there.

    Its dependencies are those of the environment that this script runs in.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    environment = {"PATH": str(folder / "bin"), "HOME": str(folder), "PYTHONSAFEPATH": "1"}
    environment |= {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "LANG", "LC_"))}
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, env=environment)
    # After the environment's own packages, so that gcfast is the wheel's.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(ours) + "\n")
    code = f"""
import shutil, gcfast, gcfast._core
found = [c for c in ("cc", "c++", "gcc", "g++", "clang", "cmake", "ninja") if shutil.which(c)]
assert not found, found
assert all(m.__file__.startswith({str(site)!r}) for m in (gcfast, gcfast._core)), gcfast.__file__
"""
    run(python, "-c", code, env=environment)
    tests = ("-q", "-p", "no:cacheprovider", *TESTS)
    run(python, "-m", "pytest", *tests, cwd=tree, env=environment)


def main() -> None:
    """Leave the source distribution and the wheel in the folder that is named."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist = same_sdist(folder)
        tree = unpacked(sdist, folder)
        wheel = build("wheel", tree, folder / "built")
        repair = (sys.executable, "-P", "-m", "auditwheel", "repair", "--wheel-dir")
        run(*repair, folder / "repaired", wheel)
        (wheel,) = (folder / "repaired").iterdir()
        without_compiler(wheel, tree, folder / "environment")
        for made in (sdist, wheel):
            made.replace(out / made.name)
            print(out / made.name)


if __name__ == "__main__":
    main()
