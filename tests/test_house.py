"""The layout of the package: imports run one way, the engine knows nothing of files, and files stay short."""

import ast
import sys
from functools import cache
from pathlib import Path

import dera_peft

PACKAGE = Path(dera_peft.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400
MAX_CHAIN = 9  # of rooms: a folder of the package, or a file beside them


def name_of(file: Path) -> str:
    return ".".join(("dera_peft", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(file): file for file in FILES}


@cache
def imported(file: Path) -> frozenset[str]:
    """What a file imports, inside functions too, by the full name."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else node.module)
    return frozenset(names)


def longest_chain(arrows: dict[str, set[str]]) -> list[str]:
    """The longest path; fails at a circle."""
    done: dict[str, list[str]] = {}

    def chain(name: str, under: tuple[str, ...]) -> list[str]:
        assert name not in under, f"a circle of imports: {' -> '.join((*under[under.index(name) :], name))}"
        if name not in done:
            below = [chain(other, (*under, name)) for other in sorted(arrows[name])]
            done[name] = [name, *max(below, key=len, default=[])]
        return done[name]

    return max((chain(name, ()) for name in arrows), key=len)


def test_no_file_imports_itself_by_way_of_others():
    longest_chain({name: imported(file) & MODULES.keys() for name, file in MODULES.items()})


def test_rooms_import_one_way():
    def room(name: str) -> str:
        return name.split(".")[1] if "." in name else "__init__"

    arrows: dict[str, set[str]] = {room(name): set() for name in MODULES}
    for name, file in MODULES.items():
        arrows[room(name)] |= {room(other) for other in imported(file) & MODULES.keys()} - {room(name)}
    chain = longest_chain(arrows)
    assert len(chain) <= MAX_CHAIN, " -> ".join(chain)


def test_the_engine_knows_nothing_of_files():
    allowed = {"torch", "transformers", "peft"}
    for name, file in MODULES.items():
        if name.startswith("dera_peft.engine"):
            for other in imported(file):
                inside = other.startswith("dera_peft.engine.") or other == "dera_peft.errors"
                root = other.split(".")[0]
                assert inside or root in allowed or root in sys.stdlib_module_names, f"{name} imports {other}"
                assert other not in ("os", "json", "pathlib"), f"{name} imports {other}"


def test_nothing_is_imported_by_a_name_made_at_run_time():
    for file in FILES:
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"import_module", "__import__"}, file


def test_files_are_short():
    assert {str(file): n for file in FILES if (n := len(file.read_text().splitlines())) > MAX_LINES} == {}
