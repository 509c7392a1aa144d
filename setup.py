"""Build entry point: compiles csrc into a shared library; everything declarative is in pyproject.toml.

The library has a plain C ABI and is loaded by ctypes. It sees neither Python nor torch, so one wheel
serves every version of both: `py3-none-<platform>`, or `py3-none-any` when nothing was compiled.

TOPR_BUILD=auto  compile; if that fails, warn and install without the library (the default)
TOPR_BUILD=cpu   compile; if that fails, fail
TOPR_BUILD=none  compile nothing

CXX, CXXFLAGS and LDFLAGS are honoured, but by MSVC; CXXFLAGS=-march=... lifts the baseline too.
"""

import os
import shlex
import sys
from glob import glob
from pathlib import Path
from subprocess import CalledProcessError
from tempfile import TemporaryDirectory

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, OptionError, SetupError

# In the library's place where it could not be built: why, for whoever looks for it at run time.
REASON = Path("topr_kernels", "_native_missing.txt")
LIBRARY = Path("topr_kernels", "_native.dll" if sys.platform == "win32" else "_native.so")

# errno of a math function keeps loops from becoming vectors. Never -ffast-math: NaN and inf are results.
# No contraction: a sum must have the same bits wherever its loop is inlined.
UNIX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -g0"
UNIX_ISA = {
    "rows_avx2.cpp": "-mavx2 -mfma -mf16c",
    # Python's -Wall prints 4000 lines of false alarms from GCC's own AVX-512 headers (its bug 105593).
    "rows_avx512.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -Wno-uninitialized",
}
# Without the names of what is not exported: a third of the library. Apple's linker knows no -s.
STRIP = ["-Wl,-s"] if sys.platform.startswith("linux") else []
# The baseline alone: csrc detects instruction sets with what GCC and Clang offer.
MSVC_FLAGS = "/O2 /std:c++17 /EHsc"

OPENMP_PROBE = """
#include <omp.h>
extern "C" int probe() { return omp_get_max_threads(); }
"""
ISA_PROBE = """
#if !defined(__x86_64__)
#error "not x86-64"
#endif
#include <immintrin.h>
extern "C" int probe() { return 0; }
"""
COMPILER = "a C++17 compiler (g++, clang++ or MSVC; CXX names it)"


class BuildLibrary(build_ext):
    """Builds the library as package data; an extension only by the commands that come with one."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library in the package, without the tag of a Python extension."""
        return str(LIBRARY)

    def run(self) -> None:
        """Does what TOPR_BUILD says; what an earlier build left behind goes in any case."""
        wanted = os.environ.get("TOPR_BUILD", "auto")
        if wanted not in {"auto", "cpu", "none"}:
            raise OptionError(f"TOPR_BUILD is {wanted!r}, expected 'auto', 'cpu' or 'none'")
        for earlier in (LIBRARY, REASON):
            Path(self.build_lib, earlier).unlink(missing_ok=True)
            if self.inplace:
                earlier.unlink(missing_ok=True)
        if wanted == "none":
            print("topr_kernels: no native CPU kernels, as TOPR_BUILD=none asks")
            self.extensions = []
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            # The command line of a failed call says nothing that the compiler has not said better.
            said = isinstance(error.__context__, CalledProcessError)
            cause = "the compiler failed, its message stands above" if said else error
            if wanted == "cpu":
                raise SetupError(
                    f"TOPR_BUILD=cpu, but the native CPU kernels cannot be built: {cause}. Install "
                    f"{COMPILER}, or do with the portable torch kernels: TOPR_BUILD=auto"
                ) from error
            print(
                f"warning: topr_kernels is built without its native CPU kernels: {cause}. The "
                "portable torch kernels will serve in their place. For the native ones install "
                f"{COMPILER} and reinstall with pip install --force-reinstall --no-deps --no-cache-dir; "
                "TOPR_BUILD=cpu makes this an error.",
                file=sys.stderr,
            )
            reason = Path("" if self.inplace else self.build_lib, REASON)
            self.mkpath(str(reason.parent))
            reason.write_text("the compiler failed" if said else str(error))
            # Nothing to copy into the source tree or to record.
            self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        """Compiles each file with the flags of its instruction set, and links."""
        msvc = self.compiler.compiler_type == "msvc"
        # What the caller wants comes last, to win over -O3 and -g0.
        own = os.environ.get("CXXFLAGS", "")
        flags = shlex.split(MSVC_FLAGS if msvc else f"{UNIX_FLAGS} {own}")
        openmp = ["/openmp" if msvc else "-fopenmp"]
        if not self.takes(OPENMP_PROBE, [*flags, *openmp]):
            openmp = []
        sets = ["baseline"]
        objects = []
        for source in ext.sources:
            isa = [] if msvc else UNIX_ISA.get(Path(source).name, "").split()
            if isa and self.takes(ISA_PROBE, [*flags, *isa]):
                sets.append(Path(source).stem.removeprefix("rows_"))
            else:
                # Compiled all the same: without its instruction set the file is empty.
                isa = []
            objects += self.compile(source, [*flags, *openmp, *isa], self.build_temp)
        library = Path(self.build_lib, LIBRARY)
        # Linked elsewhere: some linkers leave more than the library.
        linked = self.link(objects, openmp, self.build_temp)
        self.mkpath(str(library.parent))
        self.copy_file(linked, str(library))
        compiler = getattr(self.compiler, "compiler_cxx", [self.compiler.compiler_type])[0]
        threads = "with OpenMP" if openmp else "serial as it has no OpenMP"
        print(f"topr_kernels: built {library} by {compiler}, {threads}, for {', '.join(sets)}")

    def compile(self, source: str, flags: list[str], folder: str) -> list[str]:
        """Object files of a source, always compiled anew."""
        return self.compiler.compile([source], output_dir=folder, extra_postargs=flags)

    def link(self, objects: list[str], openmp: list[str], folder: str) -> str:
        """Path of a shared library of these objects."""
        linked = str(Path(folder, LIBRARY.name))
        flags = [] if self.compiler.compiler_type == "msvc" else [*openmp, *STRIP]
        self.compiler.link_shared_object(objects, linked, extra_postargs=flags, target_lang="c++")
        return linked

    def takes(self, code: str, flags: list[str]) -> bool:
        """Whether the compiler makes a library of the code with these flags."""
        with TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(code)
            try:
                self.link(self.compile(str(source), flags, folder), flags, folder)
            except CCompilerError:
                return False
        return True


class Wheel(bdist_wheel):
    """Tags the wheel by what is in it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python; any platform too, if there is no library."""
        built = Path(self.get_finalized_command("build_ext").build_lib, LIBRARY).exists()
        self.root_is_pure = not built
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        # Relative paths: sdist takes what stands here.
        Extension("topr_kernels._native", sorted(glob("csrc/*.cpp")), depends=glob("csrc/*.h"))
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
