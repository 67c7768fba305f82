"""The house: imports run down only, in no circle, and no file holds several jobs."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "curvopt").rglob("*.py"))

# What stands further left knows nothing of what stands further right; what shares a place stands
# side by side.
ORDER = """
    errors | dtypes | looks | axes | structures | ops losses | recording | quantities | engine |
    api products datasets | jacobians verify | parallel | privacy | optim | compiled
"""
FLOORS = {name: at for at, names in enumerate(ORDER.split("|")) for name in names.split()}
LINES = 400


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path):
    """Modules of the package, those for type hints and inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield from [name for name in (full, node.module) if name in MODULES][:1]


ARROWS = {name: set(imported(path)) - {name} for name, path in MODULES.items()}


def room(module):
    return [*module.split("."), ""][1]


def circle(arrows):
    """Some circle, as the modules on the way around; empty if there is none."""
    done = set()

    def walk(module, way):
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        found = next(filter(None, (walk(to, [*way, module]) for to in sorted(arrows[module]))), [])
        done.add(module)
        return found

    return next(filter(None, (walk(module, []) for module in sorted(arrows))), [])


def test_no_circles():
    found = circle(ARROWS)
    assert not found, " -> ".join(found)


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_arrows_run_down():
    up = defaultdict(list)
    for module, others in ARROWS.items():
        for other in others:
            here, there = room(module), room(other)
            if here and here != there and FLOORS[there] >= FLOORS[here]:
                up[here, there].append(f"{module} -> {other}")
    assert not up, "\n".join(arrow for arrows in up.values() for arrow in arrows)


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES} - {""} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_is_too_long(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LINES, f"{path.relative_to(ROOT)} has {lines} lines"
