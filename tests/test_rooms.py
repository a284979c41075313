"""Which part of the project may import which, and where architectures are known by name."""

import ast
from pathlib import Path

import pytest

from elo.model.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
# Each may import from those before it; `elo` itself are the files at its root: the method.
ROOMS = ("common", "cpu", "model", "text", "runs", "data", "variants")
ORDER = [*(f"elo.{room}" for room in ROOMS), "elo", "elo.generation", "elo.planning", "eval", "examples", "benchmarks"]
ORDER.append("experiments")
TOPS = [name for name in ORDER if "." not in name]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def modules() -> dict[str, Path]:
    paths = [*ROOT.glob("*.py"), *(path for top in TOPS for path in (ROOT / top).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = modules()


def room(module: str) -> str:
    """`elo.model` for elo.model.cache, `elo` for elo.slicing, `eval` for eval.figures.plot, `train` for the script."""
    parts = module.split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in ORDER else parts[0]


def imported(module: str, source: str) -> set[str]:
    """The modules of this project that one imports, anywhere in it; a package's name brings its __init__."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relative to itself: its room cannot be seen"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from elo import methods` is of a module, `from elo.methods import make` of what is in one.
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] in {*SCRIPTS, *TOPS}}


IMPORTS = {module: imported(module, path.read_text()) for module, path in MODULES.items()}


def is_allowed(importer: str, target: str) -> bool:
    here, there = room(importer), room(target)
    if here in SCRIPTS:
        return there.split(".")[0] == "elo"
    if there in SCRIPTS:  # what a script does is called as a user does it, or by what stands outside
        return here in ("benchmarks", "examples", "experiments")
    return ORDER.index(there) <= ORDER.index(here)


def test_no_import_from_a_higher_room():
    wrong = [(one, other) for one, others in IMPORTS.items() for other in others if not is_allowed(one, other)]
    assert wrong == []


def test_no_import_in_a_circle():
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for other in IMPORTS.get(module, ()):
                visit(other, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_every_room_has_its_place():
    assert {room(module) for module in MODULES} - SCRIPTS == set(ORDER)
    assert {path.parent.name for path in ROOT.glob("elo/*/*.py")} == {
        r.removeprefix("elo.") for r in ORDER if "elo." in r
    }


@pytest.mark.parametrize(
    ("importer", "line", "is_right"),
    [
        ("elo.common.errors", "from elo.model.cache import KVCache", False),
        ("elo.model.cache", "def f():\n    import elo.slicing", False),
        ("elo.slicing", "from elo import generation", False),
        ("elo.generation.engine", "from elo.planning.costs import calls", False),
        ("elo.planning.plan", "from eval import tables", False),
        ("elo.training", "import benchmarks.sides as sides", False),
        ("elo.training", "import train", False),
        ("eval.tables", "import train", False),
        ("train", "from eval import tables", False),
        ("train", "import align", False),
        ("train", "from elo import methods", True),
        ("elo.planning.plan", "from elo import methods", True),
        ("elo.slicing", "from elo.model import decoder", True),
        ("examples.demo", "from eval.tables import align", True),
    ],
)
def test_wrong_directions_are_seen(importer, line, is_right):
    (target,) = imported(importer, line)
    assert is_allowed(importer, target) == is_right


def test_architectures_are_known_by_name_in_one_file():
    """What differs by architecture asks its record; which it is, only the reader of config.json asks. Chat formats and
    tokenizers go by names of their own, which may be the same."""
    classes, types = ({getattr(known, name) for known in ARCHITECTURES} for name in ("name", "model_type"))
    fields = {"architectures", "model_type"}
    found = {}
    for path in ROOT.glob("elo/**/*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        names = classes if path.parent.name == "text" else classes | types | fields
        found |= {str(path.relative_to(ROOT)): texts & names} if texts & names else {}
    assert found.pop("elo/model/architectures.py") >= classes | types
    assert found == {"elo/model/config.py": fields}
