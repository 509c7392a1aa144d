"""The native library as a package: content and tags of the wheels, and installs without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = "topr_kernels/_native.dll" if sys.platform == "win32" else "topr_kernels/_native.so"
PLATFORM = re.sub(r"[-.]", "_", sysconfig.get_platform())
# How the library gets its speed is no matter here, and -O3 takes its time.
FAST = {"CXXFLAGS": "-O0"}


def copy_tree(to: Path) -> Path:
    """What an sdist is made from; no library that was built in place."""
    to.mkdir(parents=True)
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, to)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.dll")
    for name in ("csrc", "topr_kernels"):
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    return to


def run(*command: str, cwd: Path, env: dict[str, str]) -> tuple[int, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in {"TOPR_BUILD", "CXXFLAGS"}}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=inherited | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def pip_wheel(source: Path, out: Path, **env: str) -> tuple[int, str]:
    """Exit code and everything printed; neither the registry nor an isolated environment is needed."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir"]
    options += ["--disable-pip-version-check", "--wheel-dir", str(out)]
    return run("-m", "pip", "wheel", "-v", *options, str(source), cwd=out.parent, env=env)


def hook(tree: Path, name: str, out: Path, **env: str) -> str:
    """Output of a hook of the build backend, as pip and build call it."""
    out.mkdir(exist_ok=True)
    script = f"from setuptools import build_meta; build_meta.{name}({str(out)!r})"
    code, output = run("-c", script, cwd=tree, env=env)
    assert code == 0, output
    return output


def only_wheel(out: Path) -> tuple[str, set[str], str]:
    """Tag in the name, files, and WHEEL of the one wheel in a folder."""
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (meta,) = (n for n in names if n.endswith(".dist-info/WHEEL"))
        return wheel.stem.split("-", 2)[2], names, archive.read(meta).decode()


def assert_no_library(out: Path, *, failed: bool) -> None:
    tag, names, meta = only_wheel(out)
    # What tells a user at run time, as pip hides the warning.
    assert ("topr_kernels/_native_missing.txt" in names) == failed
    assert tag == "py3-none-any"
    assert "Tag: py3-none-any" in meta and "Root-Is-Purelib: true" in meta
    assert "topr_kernels/py.typed" in names
    assert not [n for n in names if n.endswith((".so", ".dll", ".pyd"))]


def assert_library(out: Path) -> None:
    tag, names, meta = only_wheel(out)
    assert tag == f"py3-none-{PLATFORM}"
    assert f"Tag: py3-none-{PLATFORM}" in meta and "Root-Is-Purelib: false" in meta
    assert "topr_kernels/py.typed" in names
    # One library under its plain name, and nothing that a linker leaves beside it.
    assert {n for n in names if "_native" in n} == {LIBRARY}
    assert not [n for n in names if n.startswith("csrc")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A tree from which a wheel was built, the folder of the wheel, and everything printed."""
    folder = tmp_path_factory.mktemp("built")
    tree, out = copy_tree(folder / "tree"), folder / "out"
    code, output = pip_wheel(tree, out, **FAST)
    assert code == 0, output
    return tree, out, output


def test_wheel_holds_a_library_that_needs_neither_python_nor_torch(
    built: tuple[Path, Path, str], tmp_path: Path
) -> None:
    _, out, output = built
    assert_library(out)
    (said,) = re.findall(r"topr_kernels: built .*", output)
    assert Path(LIBRARY).name in said and "OpenMP" in said and "baseline" in said
    assert "warning: topr_kernels" not in output
    # Whatever C++17 compiler a Linux has, it can do these.
    if sys.platform == "linux":
        assert "with OpenMP" in said
    if PLATFORM == "linux_x86_64":
        assert said.endswith("for baseline, avx2, avx512")

    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract(LIBRARY, tmp_path))
    # Names lie between zeros in the symbol tables of ELF and Mach-O and in the imports of PE.
    content = library.read_bytes()
    assert b"\0topr_params_size\0" in content or b"\0_topr_params_size\0" in content
    foreign = (
        rb"\0(_?_?Py[A-Z_]\w+|\w*(?:3c102?|2at|5torch)\d\w+|\w*lib(?:torch|c10|python)[\w.]*)\0"
    )
    assert not re.findall(foreign, content)

    # -I -S: no site-packages, hence no torch.
    script = f"""
import ctypes, importlib.util
assert importlib.util.find_spec("torch") is None
library = ctypes.CDLL({str(library)!r})
library.topr_params_size.restype = ctypes.c_int64
print(library.topr_params_size(), library.topr_isa_available())
"""
    code, output = run("-I", "-S", "-c", script, cwd=tmp_path, env={})
    assert code == 0, output
    size, isa = map(int, output.split())
    assert size > 0 and isa >= 1


NO_COMPILER = {"CXX": "/absent/c++", "CC": "/absent/cc", "PATH": "/absent"}
BROKEN = {"CXXFLAGS": "-include absent.h"}


@pytest.mark.parametrize(
    ("env", "cause"),
    [(NO_COMPILER, r"native CPU kernels.*/absent/c\+\+"), (BROKEN, r"absent\.h: No such file")],
    ids=["no compiler", "compiler fails"],
)
def test_without_the_library_auto_warns_once_and_cpu_fails(
    tmp_path: Path, env: dict[str, str], cause: str
) -> None:
    tree, out = copy_tree(tmp_path / "tree"), tmp_path / "out"
    code, output = pip_wheel(tree, out, **env)
    assert code == 0, output
    assert_no_library(out, failed=True)
    (said,) = re.findall(r"warning: topr_kernels.*", output)
    for word in ("portable torch kernels", "C++17 compiler", "--no-cache-dir", "TOPR_BUILD=cpu"):
        assert word in said
    assert re.search(cause, output)

    shutil.rmtree(out)
    code, output = pip_wheel(tree, out, TOPR_BUILD="cpu", **env)
    assert code != 0 and not list(out.glob("*"))
    (said,) = re.findall(r"error: TOPR_BUILD=cpu.*", output)
    assert "C++17 compiler" in said and "TOPR_BUILD=auto" in said
    assert re.search(cause, output)


def test_stale_library_gets_into_no_wheel_that_should_have_none(
    built: tuple[Path, Path, str], tmp_path: Path
) -> None:
    tree, _, _ = built
    (library,) = tree.glob(f"build/lib*/{LIBRARY}")
    for i, env in enumerate(({"TOPR_BUILD": "none"}, NO_COMPILER)):
        library.write_bytes(b"of an earlier build")
        (tree / LIBRARY).write_bytes(b"of an earlier editable install")
        out = tmp_path / str(i)
        code, output = pip_wheel(tree, out, **env)
        assert code == 0, output
        assert_no_library(out, failed=env == NO_COMPILER)
        assert ("warning: topr_kernels" in output) == (env == NO_COMPILER)
        # A wheel is none of the source tree's business.
        assert (tree / LIBRARY).exists()


def test_unknown_wish_is_refused(tmp_path: Path) -> None:
    code, output = pip_wheel(copy_tree(tmp_path / "tree"), tmp_path / "out", TOPR_BUILD="cuda")
    assert code != 0
    assert "TOPR_BUILD is 'cuda', expected 'auto', 'cpu' or 'none'" in output


def test_sdist_holds_the_sources_and_builds(tmp_path: Path) -> None:
    tree, out = copy_tree(tmp_path / "tree"), tmp_path / "out"
    (tree / LIBRARY).write_bytes(b"of an earlier build")
    hook(tree, "build_sdist", tmp_path / "sdist")
    (sdist,) = (tmp_path / "sdist").iterdir()
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    sources = {p.relative_to(tree).as_posix() for p in tree.glob("csrc/**/*") if p.is_file()}
    sources = {n for n in sources if n.endswith((".cpp", ".h"))}
    assert "csrc/topr_kernels.cpp" in sources and sources <= names
    assert LIBRARY not in names

    code, output = pip_wheel(sdist, out, TOPR_BUILD="cpu", **FAST)
    assert code == 0, output
    assert_library(out)


def test_editable_install_builds_in_the_source_tree(tmp_path: Path) -> None:
    tree, out = copy_tree(tmp_path / "tree"), tmp_path / "out"
    hook(tree, "build_editable", out, TOPR_BUILD="cpu", **FAST)
    assert (tree / LIBRARY).stat().st_size > 1000
    # It is read from the tree; a copy in the wheel would shadow the next build.
    assert LIBRARY not in only_wheel(out)[1]
    # What the user does not want any more, or what no longer fits the sources, is not left to be loaded.
    for env in ({"TOPR_BUILD": "none"}, NO_COMPILER):
        (tree / LIBRARY).write_bytes(b"of an earlier build")
        shutil.rmtree(out)
        hook(tree, "build_editable", out, **env)
        assert not (tree / LIBRARY).exists()
