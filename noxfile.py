"""What developers and CI run: ``nox --list`` names the tasks, ``nox`` runs those that CI has.

The tasks run in the environment that is active, which CONTRIBUTING.md says how to make.
"""

import sys
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.stop_on_first_error = True

CPP = "csrc/*.?pp", "csrc/tests/*.?pp"


def _cpp_files() -> list[str]:
    return sorted(str(path) for pattern in CPP for path in Path().glob(pattern))


@nox.session
def lint(session: nox.Session) -> None:
    """Style, spelling, and whether comments name files and shapes that exist."""
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("clang-format", "--dry-run", "--Werror", *_cpp_files())
    session.run("codespell")
    session.run("python", ".ci/check_text.py")


@nox.session
def types(session: nox.Session) -> None:
    """Static types: strict for the package, as far as they go for everything else."""
    session.run("mypy")
    relaxed = ("mypy", "--config-file", ".ci/mypy.ini")
    session.run(*relaxed, "kernels", "bench", "docs", "examples", "noxfile.py", ".ci")
    # Tests call things as they must not be called.
    wrong = """arg-type assignment call-arg call-overload func-returns-value index misc operator
        type-var union-attr var-annotated"""
    options = [f"--disable-error-code={code}" for code in wrong.split()]
    session.run(*relaxed, "--cache-dir", ".mypy_cache/tests", *options, "tests")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, or those that are named: nox -s tests -- tests/ops -k top_m."""
    session.run("pytest", *(session.posargs or ["-n", "auto"]))


@nox.session
def slow(session: nox.Session) -> None:
    """The tests that are marked slow: all forms of the kernels compiled, and the longest others."""
    session.run("pytest", "-n", "auto", "--slow", "-m", "slow", *session.posargs)


@nox.session
def ray(session: nox.Session) -> None:
    """Builds and maps on a small Ray cluster of this machine; needs the extra ray-test."""
    session.run("pytest", "--ray", "-q", *(session.posargs or ["tests/on_ray"]))


@nox.session
def bench(session: nox.Session) -> None:
    """Whether every benchmark still runs; nothing is timed."""
    session.run("pytest", "--benchmark-disable", "-q", *_benchmarks())


@nox.session
def cpp(session: nox.Session) -> None:
    """The C++ tests under ThreadSanitizer and AddressSanitizer, with warnings as errors."""
    for sanitizer in ("thread", "address"):
        folder = f"build/{sanitizer}"
        options = (f"-DGCFAST_SANITIZE={sanitizer}", "-DGCFAST_WERROR=ON")
        session.run("cmake", "-S", ".", "-B", folder, "-G", "Ninja", *options, silent=True)
        session.run("cmake", "--build", folder)
        session.run("ctest", "--test-dir", folder, "--output-on-failure")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, in build/site; a warning is an error."""
    session.run("mkdocs", "build", "--strict")


@nox.session
def examples(session: nox.Session) -> None:
    """Every program of examples/, each in a folder of its own, and again over what it wrote."""
    for path in sorted(Path("examples").glob("*.py")):
        with tempfile.TemporaryDirectory() as folder:
            run = ("python", str(Path("bench/torchvision_on_cpu.py").absolute()))
            program = str(path.absolute())
            with session.chdir(folder):
                session.run(*run, program)
                session.run(*run, program)


@nox.session
def wheel(session: nox.Session) -> None:
    """The release's files, in dist/: the wheel is tried where there is no compiler."""
    session.run("python", ".ci/wheel.py", "dist")


@nox.session(default=False, venv_backend="uv", python=["3.11", "3.12", "3.13"])
@nox.parametrize("versions", ["lowest-direct", "highest"])
def matrix(session: nox.Session, versions: str) -> None:
    """The tests with the oldest and the newest packages that pyproject.toml promises."""
    session.run_install("uv", "pip", "install", f"--resolution={versions}", ".[cpu,test]")
    session.run("uv", "pip", "list", silent=False)
    session.run("pytest", "-n", "auto", *session.posargs)


@nox.session(default=False)
def format(session: nox.Session) -> None:
    """Format Python and C++ in place."""
    session.run("ruff", "check", "--fix")
    session.run("ruff", "format")
    session.run("clang-format", "-i", *_cpp_files())


@nox.session(default=False)
def latency(session: nox.Session) -> None:
    """Fail where a commit is 10 % slower than another: nox -s latency -- main HEAD."""
    session.run(sys.executable, "bench/latency.py", *session.posargs)


def _benchmarks() -> list[str]:
    return sorted(str(path) for path in Path("bench").glob("bench_*.py"))
