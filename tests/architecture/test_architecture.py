"""The rules of the house, read from the source: who may import what, who owns what, what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptvcs

PACKAGE = Path(ckptvcs.__file__).parent

LAYERS = (
    {"errors", "ids", "canonical", "disk", "companion", "config"},
    {"store"},
    {"state"},
    {"history"},  # may import state; state never imports it
    {"maintenance"},
    {"rng"},  # a leaf of states, public by itself
    {"opening", "importing", "runs", "charts"},  # charts: pictures of histories
    {"background"},
    {"opened", "committing", "combining"},  # what handles share, their places on branches among it
    {"repo"},
    {"training", "running", "sweeping"},  # sweeping is pure; it names what running runs
    {"saver"},  # runs in a process of its own, which `background` starts by this name
    {"cli"},
)
"""From the bottom up; a layer may import itself and what is below it."""

BOTTOM = {
    "errors": set[str](),
    "ids": set[str](),
    "canonical": {"ids"},
    "disk": {"errors", "ids"},
    "companion": {"errors"},
    "config": {"errors"},
}
"""What the modules of the lowest layer may import of each other."""

OWNERS = {
    "lmdb": ["store/index.py"],
    "zstandard": ["store/entropy.py"],
    "blake3": ["ids.py"],
    "msgpack": ["canonical.py"],
    "ml_dtypes": ["state/tensors.py"],
    "torch": ["state/torch_tensors.py"],
    "jax": ["state/jax_keys.py"],  # which takes it from those who have imported it
    "tomlkit": ["config.py"],
    "matplotlib": ["charts.py"],
    "click": ["cli/"],
    "rich": ["cli/"],
    "numpy": [
        "state/",
        "store/planes.py",
        "store/difference.py",
        "store/choice.py",
        "maintenance/columns.py",  # a million rows as columns, and labels joined over them
        "maintenance/usage.py",
    ],
    "os": ["disk.py", "companion.py", "running.py"],  # files; processes and what they share
    "fcntl": ["disk.py"],
    "mmap": ["disk.py", "companion.py"],
    "shutil": ["disk.py", "cli/output.py"],  # there for the width of the terminal
    "tempfile": ["disk.py", "companion.py"],
    "subprocess": ["companion.py", "running.py", "history/environment.py"],  # there to ask git
    "socket": ["companion.py"],
    "signal": ["companion.py", "running.py", "training/preemption.py", "testing/failpoints.py"],
    "hypothesis": ["testing/strategies.py"],
}
"""Each library and each door to the operating system has one owner; `testing` doubles those doors."""

FREE_IN_TESTING = {"os", "fcntl", "mmap", "shutil", "tempfile", "numpy", "ml_dtypes", "torch"}

PUBLIC = [
    "AmbiguousError",
    "CkptError",
    "Commit",
    "ConflictError",
    "CorruptionError",
    "DroppedError",
    "ExistsError",
    "FormatError",
    "InvalidError",
    "LineageError",
    "LockedError",
    "MergeConflictError",
    "NoRepositoryError",
    "NotFoundError",
    "ObjectId",
    "PendingCommit",
    "Repo",
    "Restored",
    "StateMismatchError",
    "StorageError",
    "UnsupportedStateError",
    "rng",
]


def sources() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """store/index.py"""
    return path.relative_to(PACKAGE).as_posix()


def parse(path: Path) -> ast.Module:
    """A module's syntax."""
    return ast.parse(path.read_text(), str(path))


def modules() -> dict[str, Path]:
    """Dotted name to file."""
    found = {}
    for path in sources():
        parts = ["ckptvcs", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, at_runtime: bool = False) -> Iterator[tuple[str, int]]:
    """Every absolute dotted name a module imports, wherever in it, with the line.

    Relative imports are made absolute; `from package import module` gives the module; strings handed to
    `import_module` count. With `at_runtime`, those for type checkers alone are left out.
    """
    known = modules()
    for node in _statements(parse(path), at_runtime):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["ckptvcs", *path.relative_to(PACKAGE).parent.parts]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in known else base), node.lineno
        elif (
            isinstance(node, ast.Call)
            and "import_module" in ast.unparse(node.func)
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value), node.lineno


def _statements(tree: ast.AST, at_runtime: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if at_runtime and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _statements(node, at_runtime)


def layer(module: str) -> int | None:
    """The layer of a module of the package; None for the package itself and its entry points."""
    parts = module.split(".")
    if len(parts) < 2:
        return None
    return next((n for n, names in enumerate(LAYERS) if parts[1] in names), None)


def test_every_module_has_a_layer() -> None:
    assert len(sources()) > 30
    homeless = [name for name in modules() if layer(name) is None]
    testing = [name for name in homeless if name.split(".")[1:2] == ["testing"]]
    assert sorted(set(homeless) - set(testing)) == ["ckptvcs", "ckptvcs.__main__"]


def test_imports_only_point_down() -> None:
    wrong = []
    for name, path in modules().items():
        mine = layer(name)
        for imported, line in imports(path):
            if not imported.startswith("ckptvcs"):
                continue
            theirs = layer(imported)
            if name.startswith("ckptvcs.testing") or name in ("ckptvcs", "ckptvcs.__main__"):
                continue
            if imported.startswith("ckptvcs.testing"):
                wrong.append(f"{name_of(path)}:{line} imports {imported}, which is for tests")
            elif theirs is not None and mine is not None and theirs > mine:
                wrong.append(f"{name_of(path)}:{line} imports {imported} from a layer above")
            elif mine == theirs == 0:
                one, other = name.split(".")[1], imported.split(".")[1]
                if one != other and other not in BOTTOM[one]:
                    wrong.append(f"{name_of(path)}:{line} imports {imported} at the bottom")
    assert wrong == []


def test_the_package_itself_gives_nothing_but_its_version() -> None:
    """`from ckptvcs import Repo` inside the package would be an upward edge in disguise."""
    wrong = [
        f"{name_of(path)}:{node.lineno} {alias.name}"
        for path in sources()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.module == "ckptvcs" and not node.level
        for alias in node.names
        if f"ckptvcs.{alias.name}" not in modules() and alias.name != "__version__"
    ]
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        name: {found for found, _ in imports(path, at_runtime=True) if found in modules() and found != name}
        for name, path in modules().items()
        if name != "ckptvcs"
    }
    # A package stands for what its __init__ imports; importing a module of the package is no cycle.
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done and name in graph:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_each_library_has_one_owner() -> None:
    wrong = []
    for path in sources():
        mine = name_of(path)
        for imported, line in imports(path):
            library = imported.split(".")[0]
            if library not in OWNERS or (mine.startswith("testing/") and library in FREE_IN_TESTING):
                continue
            if not any(
                mine == owner or (owner.endswith("/") and mine.startswith(owner)) for owner in OWNERS[library]
            ):
                wrong.append(
                    f"{mine}:{line} imports {library}, which belongs to {' and '.join(OWNERS[library])}"
                )
    assert wrong == []


def test_no_foreign_library_without_an_owner() -> None:
    """A new dependency starts with a line in OWNERS (and a decision)."""
    standard = set(sys.stdlib_module_names)
    strangers = {
        f"{name_of(path)}: {library}"
        for path in sources()
        for library in {imported.split(".")[0] for imported, _ in imports(path)}
        if library not in standard and library not in OWNERS and library != "ckptvcs"
    }
    assert strangers == set()


def test_no_private_name_of_another_module_is_imported() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno} imports {alias.name} from {node.module}"
        for path in sources()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ckptvcs")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert wrong == []


def test_no_drawer_for_odds_and_ends() -> None:
    for path in sources():
        for part in path.relative_to(PACKAGE).with_suffix("").parts:
            assert part not in ("utils", "util", "helpers", "helper", "common", "misc"), path


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_nothing_stored_can_run_code(path: Path) -> None:
    """No pickle, no marshal, no eval, no exec; not in testing either."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec")
            assert called not in ("torch.load", "np.load", "numpy.load", "yaml.load")
    banned = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code"}
    assert not banned & {imported.split(".")[0] for imported, _ in imports(path)}


def test_the_library_prints_nothing() -> None:
    for path in sources():
        if not name_of(path).startswith("cli/"):
            for node in ast.walk(parse(path)):
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in ("print", "sys.stdout.write", "sys.stderr.write"), (
                        path
                    )


def test_the_environment_is_read_in_one_place() -> None:
    """`opening.py` at open; the door to it is in disk.py; the command line may ask about its own output."""
    readers = {
        name_of(path)
        for path in sources()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Name) and node.id == "environment_variable" and isinstance(node.ctx, ast.Load)
    }
    assert {name for name in readers if not name.startswith("cli/")} == {"opening.py"}
    for path in sources():
        if name_of(path) != "disk.py":
            assert "environ[" not in path.read_text(), path
            assert "getenv" not in path.read_text(), path


def test_public_names() -> None:
    assert sorted(ckptvcs.__all__) == PUBLIC
    for name in ckptvcs.__all__:
        assert getattr(ckptvcs, name).__doc__, name
    assert set(PUBLIC) <= set(dir(ckptvcs))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ckptvcs.nonsense  # noqa: B018


def test_the_methods_of_a_repository_are_those_promised() -> None:
    promised = ["init", "open", "on", "close", "commit", "checkout", "restore", "resolve", "log", "branch"]
    promised += ["commit_async", "branches", "delete_branch", "tag", "gc", "fsck"]
    assert set(promised) <= set(dir(ckptvcs.Repo))


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_every_public_thing_is_described(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree) or not tree.body, "the module"
    undescribed = []
    described = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
    }

    def look(body: list[ast.stmt], prefix: str, inherits: bool) -> None:
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if node.name.startswith("_"):
                continue
            # A method may be described where it was first declared: in a base, or its twin in this module.
            elsewhere = bool(prefix) and (inherits or node.name in described)
            if not ast.get_docstring(node) and (isinstance(node, ast.ClassDef) or not elsewhere):
                undescribed.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{prefix}{node.name}.", bool(node.bases))

    look(tree.body, "", False)
    assert undescribed == []


def loaded_by(statement: str) -> set[str]:
    """The top-level modules a fresh interpreter has loaded after a statement."""
    script = f"{statement}\nimport sys\nprint(*sorted(name.split('.')[0] for name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_by("import ckptvcs")
    assert "ckptvcs" in loaded
    heavy = {
        "numpy",
        "torch",
        "lmdb",
        "zstandard",
        "blake3",
        "msgpack",
        "click",
        "rich",
        "ml_dtypes",
        "tomlkit",
    }
    assert not loaded & heavy
    assert not loaded_by("import ckptvcs; ckptvcs.CkptError; ckptvcs.__version__") & (heavy - {"blake3"})


def test_importing_the_facade_loads_no_framework() -> None:
    loaded = loaded_by("import ckptvcs; ckptvcs.Repo")
    assert "lmdb" in loaded
    # numpy comes with the first state that is written or read; `ckpt log` never needs it.
    assert not loaded & {
        "numpy",
        "ml_dtypes",
        "torch",
        "jax",
        "tensorflow",
        "keras",
        "click",
        "rich",
        "tomlkit",
        "hypothesis",
    }
