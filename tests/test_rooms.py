"""Who may import whom, read from the source; and what must not be needed to start or to take a step."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (  # a module may import from its own group and from those before it
    {"config", "suites", "files", "status"},
    {
        *("environment", "process", "swap", "s3", "storage", "hlo", "aot", "gpus", "chips", "distributed", "preemption"),
        *("sharding", "placement", "data", "models", "losses"),
    },
    {"build", "train", "checkpoint", "restore", "preservation", "metrics"},
    {"evals", "generate", "export", "plan", "bench", "report", "interop"},
    {"arguments", "declared", "commands", "data_commands", "eval_commands", "weight_commands", "eval_options", "options", "cli"},
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
NAMELESS = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "base", "core"}
FILES = sorted((ROOT / "clipjax").rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Every module that a file imports, wherever in the file; a name imported from a package is the submodule if there is one."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_its_place():
    assert {room(m) for m in MODULES} - {""} <= LEVEL.keys()


def test_imports_go_to_the_left():
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imports(path)
        if other.startswith("clipjax.") and module != "clipjax" and LEVEL[room(other)] > LEVEL[room(module)]
    ]
    assert wrong == []


def test_no_module_imports_the_command_line_or_code_outside_the_package():
    outside = {"configs", "launch", "tests", "benchmarks"}
    for module, path in MODULES.items():
        assert not {name.split(".")[0] for name in imports(path)} & outside, module
        assert not {name for name in imports(path) if name.startswith("clipjax.cli")}, module


def test_configs_import_nothing_but_clipjax_config():
    files = sorted((ROOT / "configs").rglob("*.py"))
    assert files
    for path in files:
        ours = {name for name in imports(path) if name not in sys.stdlib_module_names}
        assert ours <= {"clipjax.config"}, path


def test_data_holds_no_jax_and_the_model_no_mesh():
    for module, path in MODULES.items():
        names = imports(path)
        if room(module) in ("config", "data"):
            assert not {n for n in names if n.split(".")[0] in ("jax", "flax", "optax", "torch", "tensorflow")}, module
        if room(module) in ("models", "losses"):
            assert not {n for n in names if n.startswith(("clipjax.sharding", "optax", "jax.sharding"))}, module


def test_no_cycle_leads_through_two_rooms():
    """Lazy imports count too. Within a room two modules may know each other lazily, as a source and its kinds do."""
    graph = {m: {n for n in imports(p) if n.startswith("clipjax") and room(n) != room(m)} for m, p in MODULES.items()}
    for module, path in MODULES.items():
        graph[module] |= {n for n in imports(path, top_only=True) if n.startswith("clipjax")}
    try:
        TopologicalSorter({m: others - {m} for m, others in graph.items()}).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_names_say_something_and_files_are_short():
    for path in FILES:
        assert not NAMELESS & set(path.relative_to(ROOT).with_suffix("").parts), path
        lines = len(path.read_text().splitlines())
        assert lines <= 300, f"{path}: {lines} lines"


def test_no_import_by_string():
    """Of our own modules; PyTorch's libraries, which may be absent, are tried by name."""
    for module, path in MODULES.items():
        strings = {
            n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        dynamic = {n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name) and n.id in ("__import__", "eval")}
        assert not dynamic, module
        assert not strings & MODULES.keys() - {"clipjax"}, module


HEAVY = ("jax", "flax", "optax", "orbax", "numpy", "tensorflow_datasets", "grain", "torch", "transformers", "tyro", "pydantic")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import clipjax",
        "from clipjax import cli\ntry: cli.main(['--help'])\nexcept SystemExit as e: assert not e.code",
        "from clipjax import cli\ntry: cli.main(['eval', 'zeroshot', '--help'])\nexcept SystemExit as e: assert not e.code",
        "from clipjax import cli\nassert cli.main(['train', '--help']) == 0",
    ],
    ids=["import", "--help", "eval zeroshot --help", "train --help"],
)
def test_the_start_is_light(code):
    loaded = python(f"import sys\n{code}\nprint('loaded:', *sorted(set({HEAVY!r}) & sys.modules.keys()))")
    assert loaded.splitlines()[-1] == "loaded:"


def test_a_step_needs_neither_data_nor_command_line():
    """benchmarks/step.py and whoever brings a loop of their own: the model, the losses and the step alone."""
    blocked = ("grain", "tensorflow_datasets", "array_record", "tyro", "pydantic", "tokenizers", "torch", "orbax", "PIL", "tqdm")
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import jax
jax.config.update("jax_platforms", "cpu")
from clipjax import config, losses, sharding
from clipjax.models import clip
from clipjax.train.optimizer import make_optimizer
from clipjax.train.state import initial_state
from clipjax.train.step import jit_step, make_train_step
shape = dict(width=8, depth=1, heads=1, mlp_dim=8, embed_dim=8)
image, text = config.ImageTower(image_size=8, patch_size=8, **shape), config.TextTower(length=4, vocab_size=8, **shape)
run = config.Run(data=config.Data(spec="emoji"), model=config.Model(image=image, text=text), train=config.Train(batch_size=4))
mesh = sharding.make_mesh(config.Mesh())
tx = make_optimizer(run.optim, run.train.steps, jax.eval_shape(lambda: clip.init(run.model, 0)))
state = jax.eval_shape(lambda: initial_state(run, tx, mesh))
batch = dict(image=jax.ShapeDtypeStruct((4, 8, 8, 3), "uint8"), text=jax.ShapeDtypeStruct((4, 4), "int32"))
batch["index"] = jax.ShapeDtypeStruct((4,), "int32")
print(jax.eval_shape(make_train_step(run, tx, mesh), state, batch)[1]["loss"].dtype)
"""
    assert python(code).strip() == "float32"
