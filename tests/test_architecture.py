"""The house's rules: who may import whom, no circles, and no file that cannot be read in one sitting."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "harmonic_triton"
LONGEST = 450  # lines of a file
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
# What only annotations name: the object is passed in, so nothing is imported when the package runs.
ANNOTATIONS = {
    (f"{PACKAGE}.losskernel.{drawn}", f"{PACKAGE}.losskernel.kernel") for drawn in ("figures", "report", "tables")
}


def imports(module, *, typing=False):
    """Modules of the package that a module imports, wherever in it; with ``typing`` those under TYPE_CHECKING alone."""
    tree = ast.parse(MODULES[module].read_text())
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or (id(node) in hidden) != typing:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{module}: imports say where they come from"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:  # of a module, or of a name in one
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
    return found - {module}


def room(module):
    """fused, losskernel, _common, tools, or the module's own name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_the_imports_are_found():
    """Else the tests below would hold for nothing."""
    assert f"{PACKAGE}.losskernel.sampling.data" in imports(f"{PACKAGE}.losskernel.sampling.sampler")
    assert f"{PACKAGE}.losskernel.sampling.stability" in imports(f"{PACKAGE}.losskernel.sampling.sampler")  # a name's
    assert f"{PACKAGE}.losskernel.traces.neighbors_triton" in imports(f"{PACKAGE}.losskernel.traces.neighbors")  # lazy
    assert len(MODULES) > 50


FORBIDDEN = {
    "integrations": {"losskernel", "tools", ""},
    "fused": {"losskernel", "tools", "functional", "modules", ""},  # the reference is one of its backends
    "losskernel": {"fused", "tools", "functional", "modules", "reference", ""},
    "_common": {"fused", "losskernel", "tools", "functional", "modules", "reference", ""},
    "functional": {"losskernel", "tools", "modules", ""},
    "modules": {"losskernel", "tools", ""},
}


@pytest.mark.parametrize("owner", FORBIDDEN)
def test_rooms_import_what_they_may(owner):
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if room(module) == owner
        for name in imports(module) | imports(module, typing=True)
        if room(name) in FORBIDDEN[owner]
    ]
    assert not wrong


def test_integrations_are_imported_on_demand():
    """By nobody here: what they stand on may not be installed, and takes seconds to import."""
    for module in MODULES:
        found = [name for name in imports(module) | imports(module, typing=True) if room(name) == "integrations"]
        assert room(module) == "integrations" or not found, module


def test_the_reference_stands_alone():
    """It is the specification: nothing that it could be wrong together with."""
    assert not imports(f"{PACKAGE}.reference") | imports(f"{PACKAGE}.reference", typing=True)


def test_no_circles():
    """Imports within functions are counted too. The old paths are looked up by name, in ``_moved``."""
    edges = {module: imports(module) for module in MODULES}
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for name in sorted(edges[module]):
            visit(name)
        path.pop()
        done.add(module)

    for module in MODULES:
        visit(module)


def test_imports_for_annotations_alone_are_few():
    """They are back-arrows in the text, if not in the running program: those of the wing are listed."""
    found = {
        (module, name) for module in MODULES if room(module) == "losskernel" for name in imports(module, typing=True)
    }
    assert found == ANNOTATIONS


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_too_long(module):
    assert len(MODULES[module].read_text().splitlines()) <= LONGEST


HOMES = {  # what is written in one file alone
    "peak memory": (r"ru_maxrss|max_memory_allocated|VmHWM|clear_refs", "harmonic_triton/tools/memory.py"),
    "excess loss": (
        r"mean\w*(\(\))?(\.item\(\))? - [\w.]*initial|- [\w.]*initial_losses\)",
        "harmonic_triton/losskernel/estimators.py",
    ),
    "a name beside a file": (r"os\.(replace|rename)\(", "harmonic_triton/_common/files.py"),
}


@pytest.mark.parametrize("thing", HOMES)
def test_has_one_home(thing):
    """In the package and the programs around it, the tests aside."""
    pattern, home = HOMES[thing]
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in (PACKAGE, "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }
    assert found == {home}


BRITISH = re.compile(
    r"artefact|behaviour|centre|centring|colour|(?<!de)favour|grey|labell|licence|modell|neighbour"
    r"|(discret|initial|memor|normal|optim|regular|standard|token|uninitial|vector)is(e|ed|er|ing|ation)\b",
    re.IGNORECASE,
)


def test_identifiers_are_spelled_as_americans_do():
    """Whole sentences may be spelled either way; a name that is typed has one spelling."""
    found = set()
    for folder in (PACKAGE, "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [getattr(node, field, None) for field in ("id", "attr", "name", "arg")]
                found |= {f"{path.name}: {name}" for name in names if isinstance(name, str) and BRITISH.search(name)}
    assert not found
