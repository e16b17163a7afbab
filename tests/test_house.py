"""The rules of the house, read from the sources: who may import whom and who may touch what."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

from trainer.families import registry

ROOT = pathlib.Path(__file__).parents[1]

# The keys of families and objectives, which need no TensorFlow, are below the config; the networks of
# families are above the layers.
FLOORS = {
    "core": 0,
    "keys": 1,
    "config": 2,
    "augment": 3,
    "data": 3,
    "layers": 3,
    "distribution": 3,
    "telemetry": 3,
    "vertex": 3,
    "families": 4,
    "objectives": 5,
    "training": 6,
    "metrics": 7,
    "probing": 7,
    "serving": 7,
    "commands": 8,
}

# What may be named where: a dotted name, and the parts or modules (by prefix) that may name it.
PLACES = {
    "tf.distribute": ("trainer.distribution", "trainer.training.step"),
    "os.environ": ("trainer.core.flags", "trainer.distribution"),
    "os.getenv": ("trainer.core.flags", "trainer.distribution"),
    "os.putenv": (),
    "absl.flags": ("trainer.core.flags", "commands"),
    "absl.app": ("trainer.core.flags",),
    "tf.io.gfile": ("trainer.core.storage",),
    "tf.io.read_file": (),
    "tf.io.write_file": (),
    "io.open": (),
    "os.open": ("trainer.core.storage", "trainer.core.output"),
    "os.fdopen": (),
    # What others may have written is read within limits, in one place.
    "json.load": ("trainer.core.documents",),
    "json.loads": ("trainer.core.documents",),
    "json.JSONDecoder": ("trainer.core.documents",),
    "yaml": ("trainer.core.documents",),
    "tf.keras": (),
    "keras": (),
    "torch": (),
}
# The second sums up what goes up from the disk and what has come down; the third has for other URLs
# what the first has; the fourth opens nothing but /dev/null.
OPENERS = (
    "trainer.core.storage",
    "trainer.core.cloud_storage",
    "trainer.core.fsspec_storage",
    "trainer.core.output",
    "trainer.data.records",
)
# Methods that open a file whatever they are called on, and the names they are harmless on.
OPENING_METHODS = {
    "open": {"Image", "PIL.Image"},
    "read_text": {"storage"},
    "read_bytes": {"storage"},
    "write_text": set(),
    "write_bytes": set(),
}
FORBIDDEN = {
    r"\b(TODO|FIXME|XXX|HACK)\b": "unfinished work",
    r"\bnan_to_num\b": "hides divergence",
    r"\braise NotImplementedError\b": "a stub",
    r"except\s*:|except (Base)?Exception:\s*pass": "swallows failures",
    r"(?<![\w./:])/(work|tmp|root|home|farm)/": "a path of one machine",
}


def part_of(module: str) -> str:
    """'trainer.data.records' is in 'data', 'trainer' in 'core'.

    'trainer.task' and 'trainer.config.__main__' are commands. Others may import the package for its
    version. What it imports itself, for `trainer.load`, is looked at as that of a command.
    """
    names = module.split(".")
    if len(names) == 1:
        return "core"
    if names[-1] == "__main__":
        return "commands"
    if re.match(
        r"trainer\.(families(\.(registry|protocol|sizes|\w+\.keys)\b|$)|objectives\.keys\b)", module
    ):
        return "keys"
    return names[1] if names[1] in FLOORS else "commands"


def imported(tree: ast.AST, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Dotted names a module imports, relative ones made absolute: `from a import b` is 'a.b'."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """'a.b.c' of an attribute chain on a name, '' of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _full_names(tree: ast.AST, imports: list[str]) -> Iterator[str]:
    """Everything imported or named by attribute, with the aliases in use undone."""
    aliases = {"tensorflow": "tf"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    names = [*imports, *(dotted(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute))]
    for name in filter(None, names):
        first, dot, rest = name.partition(".")
        full = f"{aliases.get(first, first)}{dot}{rest}"
        yield re.sub(r"^tensorflow\b", "tf", full)


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What a module's source does against the rules, one text each."""
    tree = ast.parse(source)
    part = "commands" if module == "trainer" else part_of(module)
    imports = list(imported(tree, module, is_package=is_package))
    found = []
    for target in (name for name in imports if _below(name, "trainer")):
        other = part_of(target) if target != "trainer.__version__" else "core"
        below = FLOORS[other] < FLOORS[part]
        if not (below or other == part):
            found.append(f"{module} ({part}) imports {target} ({other})")
    for name in sorted(set(_full_names(tree, imports))):
        for ruled, places in PLACES.items():
            allowed = any(_below(module, place) or place == part for place in places)
            if _below(name, ruled) and not allowed:
                found.append(f"{module} names {ruled}")
        if name.startswith("tf.random.") and not re.match(
            r"tf\.random\.(experimental\.)?(index_shuffle|stateless)", name
        ):
            found.append(f"{module} draws with {name}, which takes no seed tensor")
    found += [f"{module} opens a file: {call}" for call in _openings(tree, module)]
    if not _below(module, "trainer.families"):
        families = "|".join(registry.NAMES)
        found += [f"{module} names {m}" for m in re.findall(rf"\b(?:{families})\b", source)]
    for pattern, reason in FORBIDDEN.items():
        found += [f"{module}: {m.group()!r} ({reason})" for m in re.finditer(pattern, source)]
    return found


def _openings(tree: ast.AST, module: str) -> Iterator[str]:
    if any(_below(module, place) for place in OPENERS):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "open":
            yield "open()"
        if isinstance(node.func, ast.Attribute) and node.func.attr in OPENING_METHODS:
            receiver = dotted(node.func.value)
            if receiver not in OPENING_METHODS[node.func.attr]:
                yield f"{receiver or '...'}.{node.func.attr}()"


def find_cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, [] if there are none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            cycle = visit(target, [*path, module])
            if cycle:
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def _modules() -> dict[str, pathlib.Path]:
    found = {}
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        names = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


MODULES = _modules()


def import_graph() -> dict[str, set[str]]:
    graph = {}
    for module, path in MODULES.items():
        is_package = path.name == "__init__.py"
        names = imported(ast.parse(path.read_text()), module, is_package=is_package)
        targets = {n if n in MODULES else n.rpartition(".")[0] for n in names}
        graph[module] = {t for t in targets if t in MODULES and t not in {module, "trainer"}}
    return graph


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_rules(module: str) -> None:
    path = MODULES[module]
    assert violations(module, path.read_text(), is_package=path.name == "__init__.py") == []


def test_no_import_cycles() -> None:
    assert find_cycle(import_graph()) == []


def test_the_loop_is_given_what_looks_at_its_snapshots() -> None:
    graph = import_graph()
    assert "trainer.training.snapshot" in graph["trainer.training.loop"]


def test_no_drawer_for_odds_and_ends() -> None:
    assert [m for m in MODULES if re.search(r"(^|\.|_)(utils?|helpers?|misc|common)$", m)] == []


def test_every_folder_is_a_known_part() -> None:
    folders = {p.name for p in (ROOT / "trainer").iterdir() if (p / "__init__.py").exists()}
    assert folders <= set(FLOORS)


def test_configs_hold_no_unfinished_work_and_no_machine_paths() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        for pattern, reason in FORBIDDEN.items():
            assert not re.search(pattern, path.read_text()), f"{path.name}: {reason}"


def test_importing_changes_nothing_in_the_process() -> None:
    """No excepthook, flag, handler or variable; what TensorFlow does to a process comes before."""
    commands = {name for name in MODULES if part_of(name) == "commands"}
    modules = sorted(set(MODULES) - commands - {"trainer.serving.check"})
    code = f"""
import importlib, os, signal, sys
import absl.app, absl.flags, tensorflow
def state():
    signals = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    return sys.excepthook, sorted(absl.flags.FLAGS), signals, dict(os.environ), sys.stdout, sys.stderr
before = state()
for module in {modules}:
    importlib.import_module(module)
after = state()
print([i for i, (a, b) in enumerate(zip(before, after)) if a != b])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr[-2000:]


def test_the_package_imports_nothing_until_a_run_is_loaded() -> None:
    code = """
import __future__, os, sys, typing
before, environment = set(sys.modules), dict(os.environ)
import trainer
assert callable(trainer.load)
print(sorted(set(sys.modules) - before), dict(os.environ) == environment)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("['trainer'] True", "")


def test_light_modules_import_neither_tensorflow_nor_fsspec() -> None:
    code = (
        "import sys, trainer.__main__, trainer.config, trainer.core.flags, "
        "trainer.core.storage, trainer.submit; "
        "print({'tensorflow', 'fsspec', 'gcsfs', 'google.cloud.aiplatform_v1'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("set()", 0), done.stderr


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("trainer.data.x", "from trainer.telemetry import images", "imports trainer.telemetry"),
        ("trainer.data.x", "from ..telemetry import images", "imports trainer.telemetry"),
        ("trainer.data.x", "def f():\n  import trainer.vertex.fit", "imports trainer.vertex"),
        ("trainer.core.x", "from trainer.families import registry", "imports trainer.families"),
        ("trainer.families.a.keys", "from trainer.layers import ops", "imports trainer.layers"),
        ("trainer.families.a.keys", "from trainer import config", "imports trainer.config"),
        ("trainer.config.x", "from trainer.families import network", "imports trainer.families"),
        ("trainer.config.x", "from trainer.objectives import phase", "imports trainer.objectives"),
        ("trainer.objectives.keys", "from trainer import config", "imports trainer.config"),
        ("trainer.layers.x", "from trainer.families import network", "imports trainer.families"),
        ("trainer.training.x", "from trainer.serving import versions", "imports trainer.serving"),
        ("trainer.serving.x", "from trainer.probing import step", "imports trainer.probing"),
        ("trainer.training.x", "from trainer import metrics", "imports trainer.metrics"),
        ("trainer.metrics.x", "from trainer.serving import rendering", "imports trainer.serving"),
        (
            "trainer.families.x",
            "from trainer.objectives import phase",
            "imports trainer.objectives",
        ),
        ("trainer.objectives.x", "from trainer.training import step", "imports trainer.training"),
        ("trainer.core.x", "from trainer import data", "imports trainer.data"),
        ("trainer.layers.x", "from trainer.training import losses", "imports trainer.training"),
        ("trainer.training.x", "from trainer import task", "(commands)"),
        ("trainer.training.x", "import tensorflow as tf\ntf.distribute.get_strategy()", "tf.distr"),
        ("trainer.training.x", "from tensorflow import distribute", "names tf.distribute"),
        ("trainer.data.x", "import os\nos.environ['A']", "names os.environ"),
        ("trainer.data.x", "from os import environ", "names os.environ"),
        ("trainer.task", "import os\nos.getenv('A')", "names os.getenv"),
        ("trainer.data.x", "from absl import flags", "names absl.flags"),
        ("trainer.training.x", "import absl.flags as f", "names absl.flags"),
        ("trainer.task", "from absl import app", "names absl.app"),
        ("trainer.data.x", "open('a')", "opens a file: open()"),
        ("trainer.data.x", "import pathlib\npathlib.Path('a').open()", "opens a file"),
        ("trainer.data.x", "path.write_text('a')", "opens a file: path.write_text()"),
        ("trainer.data.x", "import fsspec\nfsspec.open('a')", "opens a file: fsspec.open()"),
        ("trainer.data.x", "import tensorflow as tf\ntf.io.gfile.exists('a')", "tf.io.gfile"),
        ("trainer.data.x", "from tensorflow.io import gfile", "names tf.io.gfile"),
        ("trainer.layers.x", "import tensorflow as tf\ntf.random.normal([1])", "tf.random"),
        ("trainer.data.x", "import json\njson.loads('1')", "names json.loads"),
        ("trainer.data.x", "from json import load", "names json.load"),
        ("trainer.config", "import yaml", "names yaml"),
        ("trainer.layers.x", "import keras", "names keras"),
        ("trainer.layers.x", "import tensorflow as tf\ntf.keras.layers.Dense(1)", "tf.keras"),
        ("trainer.training.x", "if family == 'stylegan2': f()", "names stylegan2"),
        ("trainer.core.x", "a = 1  # TODO: better", "unfinished work"),
        ("trainer.core.x", "try:\n  f()\nexcept:\n  g()", "swallows failures"),
        ("trainer.core.x", "path = '/home/somebody/data'", "a path of one machine"),
    ],
)
def test_planted_violation_is_found(module: str, source: str, expected: str) -> None:
    assert any(expected in found for found in violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trainer.config.x", "from trainer.families import registry"),
        (
            "trainer.families.a.networks",
            "from trainer.families.a import keys\nimport trainer.layers",
        ),
        ("trainer.vertex.x", "from trainer.families.protocol import DataShape"),
        ("trainer.families.b.networks", "from trainer.families.stylegan2 import networks"),
        ("trainer.objectives.x", "from trainer.families import network"),
        ("trainer.data.x", "from . import records\nfrom trainer.core import storage"),
        ("trainer.training.step", "import tensorflow as tf\ntf.distribute.get_strategy()"),
        ("trainer.distribution.x", "import os\nos.environ['TF_CONFIG']"),
        ("trainer.task", "from absl import flags\nfrom trainer.training import loop"),
        ("trainer.data.x", "import json\njson.dumps(1)"),
        ("trainer.core.documents", "import yaml\nyaml.load('1')"),
        ("trainer.data.x", "from PIL import Image\nImage.open(file)\nstorage.read_text('a')"),
        ("trainer.layers.x", "import tensorflow as tf\ntf.random.stateless_normal([1], s)"),
        ("trainer.core.storage", "open('a')\nurl = 'gs://tmp/x'"),
    ],
)
def test_allowed_code_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_planted_cycle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert find_cycle(graph) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_planted_relative_import_in_a_package_is_resolved() -> None:
    tree = ast.parse("from . import records\nfrom .pipeline import f")
    names = set(imported(tree, "trainer.data", is_package=True))
    assert names == {"trainer.data.records", "trainer.data.pipeline.f"}


def test_the_loop_is_one_function_that_can_be_read() -> None:
    tree = ast.parse((ROOT / "trainer/training/loop.py").read_text())
    (train,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert train.end_lineno is not None
    assert train.end_lineno - train.lineno < 280
