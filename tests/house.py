"""What stands where, what imports what, and what breaks the rules of the house.

    python tests/house.py        # prints all three; tests/test_house.py fails on the rules

The rule that keeps lib thin: it holds what two or more experiments use. What one experiment alone needs stands beside
its scripts, in a package named for its subject.
"""
import ast
import json
import textwrap
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FILE_LINES, LINE_LENGTH, FUNCTION_LINES, PARAMETERS, BY_POSITION = 250, 120, 40, 8, 4
# Files of lib that stand without two users, because people import them from code of their own: file -> why.
PUBLIC = {
    "lib/__init__.py": "the package itself",
    "lib/encoder.py": "an SAE on a text, from code of one's own",
    "lib/steering.py": "steering a model from code of one's own",
    "lib/exchange/": "what others published, from code of one's own",
    "lib/training/__init__.py": "what the folder holds",
    "lib/training/many.py": "many SAEs from one read, as train_sae is one",
    "lib/metrics/": "tensors in, numbers out: for any codes and labels",
}
DATA = {"experiments/embedded_default/grammar.py"}  # word lists and sentence frames; their length is no fault
# Take any number of values, so position says enough.
VARIADIC = {"print", "zip", "max", "min", "chain", "product", "join", "joinpath", "info", "warning", "gather", "cat",
            "Sequential"}


@dataclass
class File:
    """One Python file or notebook, by its path from the project's root."""

    path: str
    cells: list[str]
    """Sources of a notebook's code cells; of a script the whole."""

    @property
    def room(self) -> str:
        return str(Path(self.path).parent)

    @property
    def house(self) -> str:
        """lib, tests, or the experiment's name."""
        parts = Path(self.path).parts
        return parts[1] if parts[0] == "experiments" else parts[0]

    @property
    def n_lines(self) -> int:
        return sum(len(cell.splitlines()) for cell in self.cells)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """The syntax tree, flat, without what only a type checker reads."""
        found, todo = [], [ast.parse("\n".join(self.cells))]
        while todo:
            node = todo.pop()
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                continue
            found.append(node)
            todo += ast.iter_child_nodes(node)
        return found


def read_files(project: Path = PROJECT) -> dict[str, File]:
    """All files of lib, experiments and tests, by path."""
    files = {}
    for top in ("lib", "experiments", "tests"):
        for path in sorted((project / top).rglob("*")):
            name = path.relative_to(project).as_posix()
            if path.suffix == ".py":
                files[name] = File(name, [path.read_text(encoding="utf-8")])
            elif path.suffix == ".ipynb" and ".ipynb_checkpoints" not in name:
                cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
                files[name] = File(name, ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    return files


def imported(file: File, files: dict[str, File]) -> set[str]:
    """Paths of the project's files that this one imports, at its head or later."""
    # The checkout's root, then the experiment's own folder, which holds its packages; the others' show what is wrong.
    places = [Path(), Path("experiments", file.house)]
    places += sorted({Path(*Path(other).parts[:2]) for other in files if other.startswith("experiments/")})
    found = set()
    for node in file.nodes:
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # a relative one
            above = ".".join(Path(file.path).parts[: -node.level])
            module = f"{above}.{node.module}" if node.module else above
            wanted = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {path for name in wanted if (path := _file_of(name, places, files)) and path != file.path}
    return found


def _file_of(module: str, places: list[Path], files: dict[str, File]) -> str | None:
    """The file that holds a module, or the longest part of its dotted name that is one."""
    for place in places:
        for end in range(module.count(".") + 1, 0, -1):
            stem = place.joinpath(*module.split(".")[:end]).as_posix()
            for path in (f"{stem}.py", f"{stem}/__init__.py"):
                if path in files:
                    return path
    return None


def floors(uses: dict[str, set[str]]) -> dict[str, int]:
    """How high each node stands: 0 if it uses no other, else one above the highest that it uses."""
    height: dict[str, int] = {}

    def climb(node: str, above: tuple[str, ...]) -> int:
        if node not in height:
            under = [climb(other, (*above, node)) for other in uses[node] if other in uses and other not in above]
            height[node] = 1 + max(under, default=-1)
        return height[node]

    return {node: climb(node, (node,)) for node in uses}


def circles(uses: dict[str, set[str]]) -> list[str]:
    """Groups of files that import one another, each as "a, b"."""
    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(uses[start])
        while todo:
            if (node := todo.pop()) not in seen:
                seen.add(node)
                todo += uses.get(node, ())
        return seen

    reached = {node: reach(node) for node in uses}
    groups = {tuple(sorted(b for b in reached[a] if a in reached.get(b, ()))) for a in uses if a in reached[a]}
    return [", ".join(group) for group in sorted(groups)]


def broken_import_rules(files: dict[str, File], uses: dict[str, set[str]]) -> list[str]:
    """A sentence for each import, or missing user, that breaks the rule."""
    said = [f"circle: {group}" for group in circles(uses)]
    for path, used in uses.items():
        house = files[path].house
        if house == "tests":
            continue
        for other in sorted(used):
            if files[other].house not in (house, "lib"):
                said.append(f"{path} imports {other}: "
                            + ("lib imports nothing from experiments" if house == "lib"
                               else "an experiment imports only lib and itself"))
    for path in files:
        if path.startswith("lib/") and not path.startswith(tuple(PUBLIC)):
            users = {files[user].house for user, used in uses.items() if path in used} - {"tests"}
            if "lib" not in users and len(users) < 2:
                said.append(f"{path} belongs beside the scripts that use it: {', '.join(users) or 'nobody uses it'}")
    return said


def sizes(file: File) -> list[tuple[str, str, int]]:
    """(rule, place, number) of whatever is too long in a file."""
    found = []
    if file.path.endswith(".py") and file.n_lines > FILE_LINES:
        found.append(("file", file.path, file.n_lines))
    for node in file.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            n_parameters = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            n_lines = (node.end_lineno or 0) - node.lineno + 1
            if n_lines > FUNCTION_LINES:
                found.append(("function", f"{file.path}:{node.name}", n_lines))
            if n_parameters > PARAMETERS:
                found.append(("parameters", f"{file.path}:{node.name}", n_parameters))
        elif isinstance(node, ast.Call):
            n_values = sum(not isinstance(value, ast.Starred) for value in node.args)
            if n_values > BY_POSITION and (name := ast.unparse(node.func)).rpartition(".")[2] not in VARIADIC:
                found.append(("by position", f"{file.path}:{name}", n_values))
    return sorted(found)


def long_lines(file: File) -> list[str]:
    """Each line beyond LINE_LENGTH: its file, length and beginning."""
    return [f"{file.path}: {len(line)} characters: {line.strip()[:60]} ..."
            for cell in file.cells for line in cell.splitlines() if len(line) > LINE_LENGTH]


def too_long(files: dict[str, File]) -> list[tuple[str, str, int]]:
    """All of sizes(), of lib and the experiments."""
    return [row for path, file in files.items() if file.house != "tests" and path not in DATA for row in sizes(file)]


def show_rooms(files: dict[str, File]) -> None:
    print(f"{'Rooms':<42} files   lines (of notebooks the code cells)")
    shown: set[str] = set()
    for room in sorted({file.room for file in files.values()}):
        for folder in (*reversed(Path(room).parents[:-1]), Path(room)):
            if str(folder) not in shown:
                inside = [file for file in files.values() if Path(file.path).is_relative_to(folder)]
                name = "  " * len(folder.parts) + folder.name
                print(f"{name:<42} {len(inside):>5} {sum(file.n_lines for file in inside):>7,}")
                shown.add(str(folder))


def show_imports(files: dict[str, File], uses: dict[str, set[str]]) -> None:
    print("\nWhat imports what: each line uses only lines below it; all experiments use lib")
    # A file beside the scripts that a package imports too stands for itself.
    low = {other for path, used in uses.items() for other in used
           if files[other].room == str(Path(files[path].room).parent) != "."}
    node = {path: path.removesuffix(".py") if path in low else file.room for path, file in files.items()}
    between = {node[path]: set[str]() for path, file in files.items() if file.house not in ("lib", "tests")}
    for path, used in uses.items():
        if node[path] in between:
            between[node[path]] |= {node[other] for other in used if files[other].house != "lib"} - {node[path]}
    height = floors(between)
    for name in sorted(between, key=lambda name: (-height[name], name)):
        others = ", ".join(sorted(Path(other).name for other in between[name]))
        print(f"  {name.removeprefix('experiments/'):<36}{f' -> {others}' if others else ''}")
    inside = {path: uses[path] for path in files if path.startswith("lib/") and not path.endswith("__init__.py")}
    height = floors(inside)
    for floor in range(max(height.values()), -1, -1):
        names = sorted(path.removeprefix("lib/").removesuffix(".py") for path in inside if height[path] == floor)
        head = f"  lib, floor {floor}     "
        print(textwrap.fill("  ".join(names), 92, initial_indent=head, subsequent_indent=" " * len(head)))


def show_broken(files: dict[str, File], uses: dict[str, set[str]]) -> None:
    print("\nAgainst the rule of imports")
    print("\n".join(f"  {line}" for line in broken_import_rules(files, uses)) or "  nothing")
    found = too_long(files)
    for rule, title in (("file", f"Files of more than {FILE_LINES} lines"),
                        ("function", f"Functions of more than {FUNCTION_LINES} lines"),
                        ("parameters", f"Functions of more than {PARAMETERS} parameters")):
        print(f"\n{title}")
        print("\n".join(f"  {n:>5}  {place}" for name, place, n in sorted(found) if name == rule) or "  none")
    print(f"\nCalls with more than {BY_POSITION} values by position")
    calls = Counter(place.partition(":")[0] for rule, place, _ in found if rule == "by position")
    print("\n".join(f"  {n:>5}  {path}" for path, n in sorted(calls.items())) or "  none")
    print(f"\nLines of more than {LINE_LENGTH} characters")
    print("\n".join(f"  {line}" for file in files.values() for line in long_lines(file)) or "  none")


if __name__ == "__main__":
    files = read_files()
    uses = {path: imported(file, files) for path, file in files.items()}
    show_rooms(files)
    show_imports(files, uses)
    show_broken(files, uses)
