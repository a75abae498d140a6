"""Arrows only go down: reads every import with `ast` and knows nothing of the project but the floors below."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# from the ground up; a module may import its own floor and what stands below it
FLOORS = [
    ("bevt_kernels",),
    ("bevt_fast.errors", "bevt_fast.refusals"),
    ("bevt_fast.config", "bevt_fast.finetune_config"),
    ("bevt_fast.data",),
    ("bevt_fast.tokenizers",),
    ("bevt_fast.models",),
    ("bevt_fast.objectives",),
    ("bevt_fast.training",),
    ("bevt_fast.studies",),
    (
        "bevt_fast.train",
        "bevt_fast.prepare",
        "bevt_fast.finetune",
        "bevt_fast.evaluate",
        "bevt_fast.export",
        "bevt_fast.study",
    ),
    ("bench", "tests"),
]
# library -> the only modules that may import it
DOORS = {"deepspeed": ("bevt_fast.training.engine",), "nvidia": ("bevt_fast.data.pipeline",)}
# module -> the only libraries it may stand on
GROUND = {
    "bevt_kernels": ("torch", "triton"),
    "bevt_fast.errors": (),
    "bevt_fast.refusals": ("pydantic",),
    "bevt_fast.config": ("pydantic",),
    "bevt_fast.finetune_config": ("pydantic",),
}
OPEN_ROOMS = ("bevt_fast.data.masking", "bevt_fast.data.sources", "bevt_fast.tokenizers")
# the two-dimensional mask is what the other strategies are made of
SHARED_PARTS = ("bevt_fast.data.masking.blockwise",)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def floor(module: str) -> int | None:
    return next((n for n, rooms in enumerate(FLOORS) if any(inside(module, room) for room in rooms)), None)


def verdict(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`; None if it may."""
    arrow = f"{module} imports {imported}: "
    library = imported.split(".")[0]
    if library in DOORS and module not in DOORS[library] and not inside(module, "tests"):
        return f"{arrow}only {DOORS[library][0]} may"
    for ground, libraries in GROUND.items():
        if inside(module, ground) and library not in (
            *libraries,
            *sys.stdlib_module_names,
            "bevt_kernels",
            "bevt_fast",
        ):
            return f"{arrow}{ground} stands on {' and '.join(libraries) or 'the standard library'} alone"
    here, there = floor(module), floor(imported)
    if here is None or there is None or inside(imported, module) or imported == "bevt_fast":
        return None
    if inside(imported, "bevt_fast.tokenizers") and any(
        inside(module, f"bevt_fast.{r}") for r in ("models", "objectives")
    ):
        return f"{arrow}the tokenizer stays outside the model"
    if there > here:
        return f"{arrow}arrows only go down"
    if inside(module, "bevt_kernels") and inside(imported, "bevt_fast"):
        return f"{arrow}kernels/ stands on torch and triton alone"
    if here == there and module in FLOORS[-2] and imported in FLOORS[-2]:
        return f"{arrow}the programs do not import one another"
    for room in OPEN_ROOMS:
        parts = [
            m for m in (module, imported) if inside(m, room) and m != room and not m.split(".")[-1].startswith("_")
        ]
        if len(parts) == 2 and module != imported and imported not in SHARED_PARTS:
            return f"{arrow}parts of an open room never meet"
    return None


def imports(path: Path, module: str) -> list[str]:
    """Absolute names of everything a file imports, `from x import y` as x.y where that is a module."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module or ""
            names += [f"{base}.{a.name}" if is_module(f"{base}.{a.name}") else base for a in node.names]
    return names


def is_module(name: str) -> bool:
    parts = name.split(".")
    top = ROOT / "kernels" if parts[0] == "bevt_kernels" else ROOT
    path = top.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def modules() -> list[tuple[Path, str]]:
    found = []
    for top, folder in ((ROOT, "bevt_fast"), (ROOT / "kernels", "bevt_kernels"), (ROOT, "bench")):
        for path in sorted((top / folder).rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            found.append((path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return found


def test_arrows_only_go_down():
    found = modules()
    assert len(found) > 30
    faults = [fault for path, module in found for name in imports(path, module) if (fault := verdict(module, name))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "imported", "reason"),
    [
        ("bevt_fast.models.bad", "bevt_fast.objectives.joint", "arrows only go down"),
        ("bevt_fast.models.bad", "bevt_fast.tokenizers.dalle", "the tokenizer stays outside the model"),
        ("bevt_fast.data.loader", "nvidia.dali.fn", "only bevt_fast.data.pipeline may"),
        ("bevt_fast.train", "deepspeed", "only bevt_fast.training.engine may"),
        ("bevt_kernels.bad", "einops", "stands on torch and triton alone"),
        ("bevt_kernels.bad", "bevt_fast.config", "arrows only go down"),
        ("bevt_fast.config", "torch", "stands on pydantic alone"),
        ("bevt_fast.train", "bevt_fast.prepare", "the programs do not import one another"),
        ("bevt_fast.data.sources.kinetics400", "bevt_fast.data.sources.file_list", "parts of an open room never meet"),
        ("bevt_fast.training.engine", "bevt_fast.train", "arrows only go down"),
    ],
)
def test_planted_mistakes_are_seen(module, imported, reason):
    assert reason in (verdict(module, imported) or "")


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Calls that run what a file says: full unpickling, yaml.load, eval, a shell."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("pickle.load", "pickle.loads", "yaml.load", "eval", "exec", "os.system"):
            found.append(name)
        if keywords.get("shell") == "True":
            found.append("shell=True")
    return found


def test_no_file_of_ours_runs_what_another_file_says():
    faults = [f"{module}: {call}" for path, module in modules() for call in unsafe_calls(ast.parse(path.read_text()))]
    assert not faults, faults
    assert unsafe_calls(ast.parse("torch.load(f)\neval(x)\nrun(c, shell=True)")) == [
        "torch.load without weights_only=True", "eval", "shell=True"]  # fmt: skip
