"""Nothing happens at import: a module's top level holds imports, definitions and constants.

The tables in `models/zoo/` may also be filled by loops and by calls of their own functions.
"""

from __future__ import annotations

import ast

# Calls that only make a value. A class or function of the same file may be called too.
MAKERS = {
    *(
        "dict",
        "frozenset",
        "list",
        "object",
        "range",
        "set",
        "tuple",
        "type",
        "int",
        "float",
        "chr",
    ),
    *("re.compile", "struct.Struct", "np.dtype", "torch.dtype", "logging.getLogger", "Path"),
    *("TypeVar", "ParamSpec", "NewType", "NamedTuple", "namedtuple", "MappingProxyType"),
    *("ContextVar", "ctypes.CFUNCTYPE", "enumerate", "zip", "sorted", "json.dumps"),
}
# Methods of literals, such as "a b".split() or table.items(), make values too.
METHODS = (".split", ".items", ".keys", ".values", ".join", ".format", ".parent", ".splitlines")
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
TABLES = "src/gristmill/models/zoo/"
GUARDS = {"TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'"}


def _own_names(tree: ast.Module, imports) -> set[str]:
    """Names a table may call: definitions of this file and classes from the package."""
    own = {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    return own | {name.split(".")[-1] for _, name in imports if name.startswith("gristmill.")}


def _calls(value: ast.AST, own: set[str]) -> list[str]:
    called = [ast.unparse(n.func) for n in ast.walk(value) if isinstance(n, ast.Call)]
    return [c for c in called if c not in MAKERS and c not in own and not c.endswith(METHODS)]


def violations(tree: ast.Module, imports=(), *, table=False) -> list[tuple[int, str]]:
    """(line, statement) of everything at the top level that acts."""
    own, found = _own_names(tree, imports), []
    for node in tree.body:
        if isinstance(node, DEFINITIONS):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in GUARDS:
            continue
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and not (
            value and _calls(value, own)
        ):
            continue
        if table and isinstance(node, ast.Expr | ast.For) and not _calls(node, own):
            continue
        found.append((node.lineno, ast.unparse(node).splitlines()[0]))
    return found


def test_nothing_happens_at_import(package):
    wrong = [
        f"{source.name}:{line} {statement}"
        for source in package
        for line, statement in violations(
            source.tree, list(source.imports()), table=source.name.startswith(TABLES)
        )
    ]
    assert not wrong, "work at import:\n" + "\n".join(wrong)


def test_acts_are_seen():
    acts = "print(1)\nimport os\nos.environ['A'] = open('x').read()\nfor i in []: pass\nX = run()"
    assert [line for line, _ in violations(ast.parse(acts))] == [1, 3, 4, 5]
    calm = (
        "import re\nA = re.compile('x')\nB = {k: v for k, v in {}.items()}\nif TYPE_CHECKING: run()"
    )
    assert violations(ast.parse(calm)) == []
    table = "def add(x): ...\nfor n in (1, 2): add(n)\nadd(3)\nadd(open('x'))"
    assert [line for line, _ in violations(ast.parse(table), table=True)] == [4]
