"""What the project says of itself holds: layers, requirements, the README's commands and imports."""

import ast
import importlib
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]
# What a file under each root may import beside the standard library and its own package; None is anything but `never`.
MAY_IMPORT = {"pallas_kernels": {"jax", "numpy", "jaxtyping"}, "jaxtopk": None}
# What we are compared with: run by another Python, or looked for at run time and done without.
FOREIGN = {
    "experiments/bench/transformers_worker.py": {"torch", "transformers"},
    "experiments/kernel_latency/measure.py": {"torch"},
    "experiments/kernel_latency/torch_peers.py": {"torch"},
}
NEVER = {"pallas_kernels": {"jaxtopk", "experiments"}, "jaxtopk": {"experiments"}}


def requirements() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def imported_packages(source: str) -> set[str]:
    """Top-level names of every import in a file, those inside functions too; relative ones stay in the package."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def layer_breaches(package: str, source: str) -> set[str]:
    """Imports that a file of `package` must not have."""
    names = imported_packages(source) - set(sys.stdlib_module_names) - {package}
    allowed = MAY_IMPORT[package]
    return names & NEVER[package] if allowed is None else names - allowed


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_each_layer_imports_only_what_lies_below_it(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    breaches = {str(f.relative_to(ROOT)): layer_breaches(package, f.read_text()) for f in files}
    assert {file: names for file, names in breaches.items() if names} == {}


@pytest.mark.parametrize(
    ("package", "source", "breach"),
    [
        ("pallas_kernels", "import jax.numpy, math", set()),
        ("pallas_kernels", "def f():\n    from flax import nnx", {"flax"}),
        ("pallas_kernels", "from jaxtopk.attention import topk", {"jaxtopk"}),
        ("jaxtopk", "import flax, pallas_kernels", set()),
        ("jaxtopk", "import experiments.quickstart", {"experiments"}),
    ],
)
def test_the_layer_check_finds_what_it_looks_for(package, source, breach):
    assert layer_breaches(package, source) == breach


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_installed_versions_are_in_the_stated_range(requirement):
    installed = Version(importlib.metadata.version(requirement.name))
    assert installed in requirement.specifier, f"{requirement}, got {installed}"


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_every_requirement_has_one_lower_bound(requirement):
    # CI makes these exact to test the oldest versions; a requirement without one would silently be the newest there.
    assert [s.operator for s in requirement.specifier].count(">=") == 1


def test_every_third_party_import_is_a_stated_requirement():
    distributions = importlib.metadata.packages_distributions()
    stated = {r.name.lower().replace("_", "-") for r in requirements()}
    known = set(sys.stdlib_module_names) | {"experiments", "jaxtopk", "pallas_kernels"}
    missing = {}
    for package in ("experiments", "jaxtopk", "pallas_kernels"):
        for file in (ROOT / package).rglob("*.py"):
            path = str(file.relative_to(ROOT))
            for name in imported_packages(file.read_text()) - known - FOREIGN.get(path, set()):
                owners = {d.lower().replace("_", "-") for d in distributions.get(name, [])}
                if not owners & stated:
                    missing.setdefault(name, []).append(path)
    assert missing == {}


# ------------------------------------------------------------------------------------------------------------- README
def readme_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def readme_commands() -> list[str]:
    """Lines of the README's shell blocks, without comments, prompts and variables set in front."""
    lines = "".join(readme_blocks("(?:bash|sh|shell|console)")).splitlines()
    commands = (re.sub(r"\s+#.*", "", line).strip().removeprefix("$ ") for line in lines)
    return [re.sub(r"^(\w+=\S* )+", "", c) for c in commands if c and not c.startswith("#")]


def command_problem(command: str) -> str | None:
    """Why a command of the README cannot work here, judged without running it; None when nothing is wrong."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    words = command.split()
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        for word in words[1:]:
            if word.startswith("EXTRA=") and word.removeprefix("EXTRA=") not in extras:
                return f"no extra {word}"
            if re.fullmatch("[a-z-]+", word) and word not in targets:
                return f"no make target {word}"
    elif "-m" in words[:2]:
        module = words[words.index("-m") + 1]
        if importlib.util.find_spec(module) is None:
            return f"no module {module}"
    elif words[0] in project["scripts"]:
        subcommand = words[1] if len(words) > 1 else ""
        source = (ROOT / "jaxtopk" / "cli.py").read_text()
        if not subcommand.startswith("-") and not re.search(rf"\b{subcommand}\b", source):
            return f"no subcommand {subcommand!r}"
    for extra in re.findall(r"\.\[([\w,-]+)\]", command):
        if unknown := set(extra.split(",")) - set(extras):
            return f"no extra {unknown}"
    for path in re.findall(r"(?<=-r )\S+|\bscripts/\S+|\./\S+", command):
        if not (ROOT / path).exists():
            return f"no file {path}"
    return None


def test_every_command_of_the_readme_exists():
    commands = readme_commands()
    assert "make quickstart" in commands
    assert "make test" in commands
    problems = {command: command_problem(command) for command in commands}
    assert {command: problem for command, problem in problems.items() if problem} == {}


@pytest.mark.parametrize(
    "command",
    [
        "make quickstrat",
        "make quickstart EXTRA=cuda99",
        "python -m experiments_of_nobody",
        "pip install -e .[gpu]",
        "pip install -r requirement.txt",
    ],
)
def test_a_wrong_command_in_the_readme_is_found(command):
    assert command_problem(command)


def test_every_import_shown_in_the_readme_resolves():
    for block in readme_blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"README: {node.module} has no {alias.name}"


def test_readme_examples_of_kernels_run():
    # Blocks that load a model need a download; those of arrays alone do not, and run as they stand.
    for block in readme_blocks("python"):
        if "pallas_kernels" in block and "jaxtopk" not in block:
            exec(compile(block, "README.md", "exec"), {})
