"""The rules of the house that a machine can check: imports, loading, the size and names of files, pins, pages."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ("research", "callbacks", "analysis", "sweeps", "conf", "tests")
EXCEPTION = "pickle.UnpicklingError"  # the one name that may be imported from there: it is what a refused load raises
UNPICKLERS = ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
ABSENT = ("torchvision", "timm")

# room: (what it may import of the house, what else it must not import); the longest matching room counts
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "research": (("research",), ()),
    "research/quant": (("research.quant",), ("lightning", "hydra", "omegaconf", "torchmetrics", "wandb")),
    "research/models": (("research.models",), ("lightning", "hydra", "omegaconf")),
    "research/data": (("research.data",), ("hydra", "omegaconf")),
    "callbacks": (("research", "callbacks"), ()),
    "analysis": (("research", "analysis"), ()),
    "sweeps": (("sweeps",), ()),
}


def sources(*folders: str) -> list[Path]:
    """All Python files below the folders, as paths relative to the repository."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a file; `package` resolves relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def import_faults(path: Path, text: str) -> list[str]:
    """Imports of a file that its room forbids."""
    room = max((room for room in ROOMS if path.is_relative_to(room)), key=len)
    allowed, forbidden = ROOMS[room]
    package = ".".join(path.parent.parts)
    names = [name for name in imports(ast.parse(text), package) if name != EXCEPTION]
    refused = (*forbidden, *UNPICKLERS, *ABSENT)
    return [name for name in names if (within(name, HOUSE) and not within(name, allowed)) or within(name, refused)]


def unsafe_loads(text: str) -> list[str]:
    """Calls that could unpickle: `torch.load` without, or any call against, `weights_only=True`; `allow_pickle`."""
    faults = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        weights_only = options.get("weights_only", "missing" if ast.unparse(node.func) == "torch.load" else "True")
        if weights_only != "True" or options.get("allow_pickle", "False") != "False":
            faults.append(f"line {node.lineno}: {ast.unparse(node)}")
    return faults


def requirement_name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt: every line is name==version"
    return {requirement_name(name): version for name, version in pairs}


def documented_commands() -> Iterator[tuple[str, list[str]]]:
    """Every `python -m research...` command in a bash block of the documentation, as (page, words)."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if "-m research." in line:
                    yield str(page.relative_to(ROOT)), shlex.split(line, comments=True)


@pytest.mark.parametrize("path", sources("research", "callbacks", "analysis", "sweeps"), ids=str)
def test_imports_run_one_way(path: Path) -> None:
    assert import_faults(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", sources("research", "callbacks", "analysis", "sweeps"), ids=str)
def test_nothing_is_unpickled(path: Path) -> None:
    assert unsafe_loads((ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("research/quant/a.py", "from research.models import resnet8"),
        ("research/quant/a.py", "from research import runs"),
        ("research/quant/quantizers/a.py", "from ... import runs"),
        ("research/quant/a.py", "def f():\n    import lightning.pytorch"),
        ("research/learning/a.py", "import callbacks.sam"),
        ("research/runs/a.py", "import pickle"),
        ("callbacks/a.py", "from analysis.collect import rows"),
        ("analysis/a.py", "import callbacks"),
        ("sweeps/a.py", "import research"),
    ],
)
def test_the_import_rule_finds_faults(path: str, text: str) -> None:
    assert len(import_faults(Path(path), text)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("research/quant/quantizers/a.py", "from ..grid import Grid\nfrom .base import Quantizer"),
        ("research/learning/a.py", "from research.quant import convert\nimport lightning"),
        ("callbacks/a.py", "from research.learning.mechanic import Mechanic"),
        ("research/runs/a.py", "from pickle import UnpicklingError"),
    ],
)
def test_the_import_rule_lets_the_right_way_pass(path: str, text: str) -> None:
    assert import_faults(Path(path), text) == []


@pytest.mark.parametrize(
    ("call", "faults"),
    [
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("Net.load_from_checkpoint(path, weights_only=flag)", 1),
        ("np.load(path, allow_pickle=True)", 1),
        ("torch.load(path, weights_only=True)", 0),
        ("np.load(path, allow_pickle=False)", 0),
    ],
)
def test_the_loading_rule_finds_faults(call: str, faults: int) -> None:
    assert len(unsafe_loads(call)) == faults


def test_files_are_small_or_named_in_the_decisions() -> None:
    decisions = (ROOT / "docs/decisions.md").read_text()
    files = sources("research", "callbacks", "analysis", "sweeps", "tests")
    long = [str(path) for path in files if len((ROOT / path).read_text().splitlines()) > 400]
    assert [path for path in long if path not in decisions] == []


def test_no_file_is_a_drawer_of_odds_and_ends() -> None:
    files = sources("research", "callbacks", "analysis", "sweeps", "tests")
    assert [str(path) for path in files if path.stem in ("utils", "util", "misc", "common")] == []


def test_every_dependency_is_pinned_once_and_torch_to_the_same_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {requirement_name(line) for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]}
    assert wanted - pins().keys() == set()
    assert pins()["torch"] == "2.13.0"
    for name in ("Makefile", "Dockerfile"):
        assert re.findall(r"torch==(\S+?)['\s]", (ROOT / name).read_text()) == ["2.13.0"], name


def test_version_and_licence_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == citation["version"]
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def test_every_callback_file_holds_its_own_name_and_a_target() -> None:
    files = sorted((ROOT / "conf/callbacks").glob("*.yaml"))
    assert files, "conf/callbacks holds no mechanic"
    for path in files:
        config = yaml.safe_load(path.read_text())
        assert list(config) == [path.stem], path.name
        assert config[path.stem]["_target_"].startswith("callbacks."), path.name


def test_the_site_lists_every_page() -> None:
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages


def test_the_site_documents_only_what_exists() -> None:
    names = [
        name
        for page in (ROOT / "docs").rglob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)
    ]
    assert names
    for name in names:
        module, _, last = name.rpartition(".")
        if not (ROOT / f"{name.replace('.', '/')}.py").is_file():
            body = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()).body
            assert last in [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)], name


def test_documented_commands_name_only_what_exists() -> None:
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    unknown, seen = [], 0
    for page, words in documented_commands():
        for key, value in (word.split("=", 1) for word in words if "=" in word):
            if key in groups:
                choices = re.findall(r"[\w/-]+", value)
                unknown += [f"{page}: {key}={c}" for c in choices if not (ROOT / f"conf/{key}/{c}.yaml").is_file()]
                seen += 1
    assert seen > 0
    assert unknown == []


def test_every_folder_of_sources_is_a_package() -> None:
    folders = {path.parent for room in ("research", "callbacks", "analysis") for path in (ROOT / room).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
