"""The import laws of CONTRIBUTING, read from the source, and a start with torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from topr_kernels import choices, limits

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "topr_kernels"
#: The house, from the cellar up: modules, or packages with all that is in them. A module may import from
#: its own floor and from those below. The package of ``ops`` and its options are leaves.
FLOORS = (
    {"_version", "baseline", "choices", "layout", "limits", "taper", "ops", "ops.options"},
    {"output", "reference", "rows", "segments", "sequence", "testing", "validation"},
    {"ops.linear", "ops.logits"},
    {"linear"},
    {"kernels"},
    {"distributed"},
    {"log_prob", "loss", ""},
    {"__main__", "hf", "integrations"},
    {"recipe"},
)
#: Lines a file may have, by package; the algorithm and the process groups are parted finer.
LONGEST = {"linear": 450, "distributed": 450}
LONGEST_ELSEWHERE = 700
KERNEL_NEEDS = {"linear.operators", "linear.tile"}
KERNEL_LEAVES = {"kernels.native_library", "kernels.triton_rows", "kernels.triton_taper"}
#: Kernels without their launches, for one module to import; they import the leaves alone.
KERNEL_STAGES = {"kernels.triton_gradient", "kernels.triton_sequences"}
OUTSIDE = {
    # module prefix -> top-level packages, beyond torch and the standard library, it may import
    "kernels": {"triton"},
    # A framework that asks for a subclass is imported by its own adapter, which it names; no other.
    "integrations.areal": {"areal"},
    "integrations.axolotl": {"axolotl", "pydantic"},
    "integrations.trinity": {"trinity"},
    "hf": {"transformers", "accelerate", "trl", "tqdm"},
    "hf.images": {"PIL"},
    "recipe": {
        "accelerate",
        "gguf",
        # math-verify, and the two packages that it is made of.
        "latex2sympy2_extended",
        "math_verify",
        "matplotlib",
        "numpy",
        "pyarrow",
        "reasoning_gym",
        "sympy",
        "tqdm",
        "transformers",
    },
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def floor(name: str) -> int:
    """The floor of a module, 0 at the bottom."""
    for i, floor in enumerate(FLOORS):
        if name in floor:
            return i
    for i, floor in enumerate(FLOORS):
        if name.partition(".")[0] in floor - {"ops"}:
            return i
    raise AssertionError(f"law 2: {name} stands on no floor; give it one in FLOORS")


def own(names: set[str]) -> set[str]:
    modules = {module_name(p) for p in PACKAGE.rglob("*.py")}
    prefix = "topr_kernels."
    return {n.removeprefix(prefix) for n in names if n.startswith(prefix)} & modules


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_follow_the_laws(path: Path) -> None:
    name, names = module_name(path), imports(path)
    top = name.split(".")[0]
    third_party = {
        n.split(".")[0] for n in names if n.split(".")[0] not in sys.stdlib_module_names
    } - {"topr_kernels", "torch"}
    allowed = OUTSIDE.get(top, set()) | OUTSIDE.get(name, set())
    assert third_party <= allowed, "law 1: imports outside their layer"

    for target in own(names):
        target_top = target.split(".")[0]
        assert floor(target) <= floor(name), f"law 2: {name} -> {target} climbs"
        if target_top == "reference":
            assert name == "reference", "law 2: nothing that computes imports the reference"
        if top == "kernels" and name != "kernels":
            assert target in KERNEL_NEEDS or target_top != "linear", f"law 2: {name} -> {target}"
            # What the kernels of one language share, its taper first, are leaves of their own.
            shared = KERNEL_LEAVES | (set() if name in KERNEL_STAGES else KERNEL_STAGES)
            assert target in shared or target_top != "kernels", f"law 2: {name} -> {target}"
            assert name not in KERNEL_LEAVES or floor(target) == 0, f"law 2: {name} -> {target}"
        if top == "ops":
            assert target_top == "ops", f"law 2: ops import torch alone, not {target}"
        assert floor(name) > 0 or top == "ops", f"law 2: the leaf {name} imports {target}"


def test_no_imports_go_in_a_circle() -> None:
    # A package is loaded before its modules: what they import from it is no circle.
    graph = {
        name: {target for target in own(imports(path)) if not name.startswith(f"{target}.")}
        for name, path in ((module_name(path), path) for path in FILES)
    }
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"law 2: a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*way, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_no_file_is_longer_than_a_sitting() -> None:
    """Prints the longest ones; ``-s`` shows them."""
    lines = {module_name(path): len(path.read_text().splitlines()) for path in FILES}
    longest = sorted(lines.items(), key=lambda x: -x[1])
    print(*(f"{count:6} {name}" for name, count in longest[:10]), sep="\n")
    for name, count in longest:
        most = LONGEST.get(name.partition(".")[0], LONGEST_ELSEWHERE)
        assert count <= most, f"{name} has {count} lines, more than {most}: part it by trade"


def choice_lists() -> dict[str, set[str]]:
    """The lists of choices by name: those of ``choices``, and the presets of the limits."""
    lists = {n: set(x) for n, x in vars(choices).items() if n.isupper() and isinstance(x, tuple)}
    return lists | {"limits.PRESETS": set(limits.PRESETS)}


def literals(path: Path) -> Iterator[tuple[int, set[str]]]:
    """Line and strings of every tuple, list, set or dict (its keys) that a file spells out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            elements: list[ast.expr | None] = [*node.elts]
        elif isinstance(node, ast.Dict):
            elements = [*node.keys]
        else:
            continue
        values = (e.value for e in elements if isinstance(e, ast.Constant))
        yield node.lineno, {value for value in values if isinstance(value, str)}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_choice_list_is_spelled_once(path: Path) -> None:
    """No module but its home spells two or more strings of a choice list in one literal."""
    homes = {"limits.PRESETS": "limits"}
    spelled_here = list(literals(path))
    for name, strings in choice_lists().items():
        if homes.get(name, "choices") == module_name(path):
            continue
        for line, spelled in spelled_here:
            assert len(spelled & strings) < 2, f"law 3: {path}:{line} repeats {name}; import it"


def test_native_numbers_of_choices_are_their_places() -> None:
    """The kernels get the place of a choice in its list; the enums of csrc name the same places."""
    header = (ROOT / "csrc" / "topr_kernels.h").read_text()
    for kind, names in (("ratio", choices.KERNEL_RATIOS), ("reduction", choices.REDUCTIONS)):
        expected = ", ".join(f"TOPR_{name.upper()} = {i}" for i, name in enumerate(names))
        assert f"enum topr_{kind} {{ {expected} }};" in header, f"enum topr_{kind}"


def test_package_imports_and_runs_with_torch_alone() -> None:
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'triton', 'transformers', 'trl', 'accelerate', 'datasets'}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import topr_kernels
assert not any(m.startswith('topr_kernels.kernels.') for m in sys.modules), 'kernels loaded at import'
import torch
assert 'torch._dynamo' not in sys.modules, 'the compiler, which takes as long as torch, at import'
out = topr_kernels.topr_loss(
    torch.zeros(1, 3, 5), torch.tensor([[0, 1, 2]]), torch.zeros(1, 3), torch.ones(1)
)
print(out.loss.item())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    # Eq. 6 at weight 1: -(1 + log_ratio) / |y| with log_ratio = 2 log(1/5).
    assert float(done.stdout) == pytest.approx(-(1 - 2 * 1.6094379124341003) / 2, rel=1e-6)


def test_every_public_name_is_documented() -> None:
    import topr_kernels

    for name in topr_kernels.__all__:
        thing = getattr(topr_kernels, name)
        if callable(thing):
            assert thing.__doc__, name
