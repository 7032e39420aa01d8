"""The shape of the house: imports go downwards, the core knows no plugin, files and functions stay short, everything is documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules(folder: str) -> dict[str, Path]:
    """The modules below a folder by their dotted names."""
    root = ROOT / folder
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.rglob("*.py"))}


CORE, PLUGINS = modules("distily"), modules("plugins")
LAYERS = [
    {"errors", "schema", "spec", "schedules", "config", "hookspecs", "__init__", "files", "memory", "terminal"},
    {"plugins", "catalogue", "listing", "scaffold", "loss.__init__", "conformance.__init__"},
    {"forms", "objectives", "layers", "mappings", "combiners", "state", "distributions", "geometry", "similarity"},
    {
        "quantization",
        "evaluation",
        "loggers",
        "batch",
        "products",
        "compilation",
        "waiting",
        "graphs",
        "kernels.__init__",
        "kernels.forms",
        "kernels.products",
        "kernels.rows",
        "kernels.scaling",
        "kernels.targets",
        "loss.heads",
        "loss.attention",
        "loss.features",
        "loss.readouts",
        "teachers",
    },
    {"loss.terms", "sources", "tokenization", "data", "embeddings", "models", "probes", "environment", "precision", "speed"},
    {
        "loss.meetings",
        "loss.gradients",
        "loss.blocks",
        "loss.fused",
        "loss.step",
        "loss.chunks",
        "loss.feature_terms",
        "loss.driver",
        "loss.calibration",
    },
    {"heldout", "checkpoints", "arguments", "prediction"},
    {"trainer", "record", "export", "testing", "conformance.objectives", "conformance.features", "conformance.combiners"},
    {"card", "report", "assembly", "measurement", "dry_run", "layer_search", "bare", "benchmark"},
    {"run", "demo.__init__"},
    {"cli", "__main__"},
]
CONTRACTS = {
    "hookspecs", "forms", "objectives", "layers", "mappings", "combiners", "state", "quantization", "evaluation", "loggers", "schema",
    "errors", "distributions", "geometry", "similarity",
}  # fmt: skip
EXCEPTIONS = {
    ("plugins", "objectives"): "names and reserved keys of the objectives' contract, no torch",
    ("catalogue", "objectives"): "the same",
    ("prediction", "trainer"): "imported for a fake training step",
}


def imports(path: Path) -> set[str]:
    """Modules of Distily that a file imports, also inside functions; type-checking imports left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "distily" else {f"distily.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "distily" or name.startswith("distily_")}


def depth(module: str) -> int:
    return next(level for level, names in enumerate(LAYERS) if module in names)


@pytest.mark.parametrize("module", sorted(CORE))
def test_the_core_imports_downwards_and_no_plugin(module):
    for name in imports(CORE[module]):
        assert not name.startswith("distily_"), f"{module} imports the plugin {name}"
        other = next(
            (known for known in (name.removeprefix("distily."), name.split(".")[min(1, name.count("."))]) if known in CORE), ""
        )
        if other in CORE and other not in ("__init__", module) and (module, other) not in EXCEPTIONS and module != "__init__":
            assert depth(other) <= depth(module), f"{module} imports {other}, which stands above it"


@pytest.mark.parametrize("module", sorted(PLUGINS))
def test_plugins_import_contracts_alone(module):
    for name in imports(PLUGINS[module]):
        if name.partition(".")[0] == module.partition(".")[0]:
            continue  # a package's own modules
        other = name.removeprefix("distily.").split(".")[0]
        assert other in {*CONTRACTS, "hookimpl", "distily"}, f"{module} imports {name}"


def test_every_module_has_its_place():
    assert set(CORE) == set().union(*LAYERS)


def definitions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def body_lines(node: ast.FunctionDef) -> int:
    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
    return node.end_lineno - first.lineno + 1


@pytest.mark.parametrize("path", [*CORE.values(), *PLUGINS.values()], ids=lambda path: path.stem)
def test_files_stay_under_350_lines_and_functions_under_60(path):
    assert len(path.read_text().splitlines()) <= 350
    longest = max(definitions(path), key=body_lines, default=None)
    if longest is not None:
        assert body_lines(longest) <= 60, f"{path.name}: {longest.name} has {body_lines(longest)} lines"


@pytest.mark.parametrize("path", CORE.values(), ids=lambda path: path.stem)
def test_public_functions_classes_and_modules_say_what_they_do(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
            if isinstance(node, ast.FunctionDef):
                assert node.returns is not None, f"{path.name}: {node.name} has no return annotation"


def loaded(code: str) -> set[str]:
    """Top-level packages that are loaded after ``code``."""
    code += "; import sys; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_help_loads_neither_torch_nor_plugins():
    packages = loaded(
        "from click.testing import CliRunner; from distily.cli import main; CliRunner().invoke(main, ['train', '--help'])"
    )
    assert not packages & {"torch", "transformers", "datasets", *PLUGINS}


def test_a_contract_costs_a_plugin_no_torch():
    packages = loaded(
        "import distily.objectives, distily.layers, distily.evaluation, distily.loggers, distily.quantization, distily.plugins"
    )
    assert not packages & {"torch", "transformers", "datasets"}


def test_the_readme_tree_names_every_module():
    readme = (ROOT / "README.md").read_text()
    missing = [name for name in CORE if name.split(".")[-1] not in readme and "__" not in name]
    assert not missing
