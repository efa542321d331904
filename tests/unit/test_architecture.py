"""The project's rules, checked on the source: who may import whom, who may import DeepSpeed, how long a file may be."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LINES_AT_MOST = 400
ROOMS = [  # from the top; a room imports from rooms below its own row, or from itself
    {"launch"},
    {"ds_roberta.report"},
    {"ds_roberta.finetuning"},
    {"preprocessing", "ds_roberta.training"},
    {"ds_roberta.evaluation"},
    {"ds_roberta.model"},
    {"ds_roberta.transformers_folder"},
    {"ds_roberta.data", "ds_roberta.inputs"},
    {
        f"ds_roberta.{name}"
        for name in (
            "command_line",
            "config",
            "deepspeed_config",
            "deepspeed_keys",
            "distributed",
            "files",
            "lease",
            "options",
            "process",
            "progress",
            "rendezvous",
        )
    },
    {"ds_roberta.errors", "ds_roberta"},
]
GROUND = ROOMS[-2] | ROOMS[-1]  # single modules, which may import each other without a cycle
PREPROCESSING_MAY_IMPORT = {"ds_roberta"} | {
    f"ds_roberta.{name}"
    for name in (
        "data.byte_level",
        "data.manifest",
        "data.shards",
        "data.tokenizer",
        "data.tokenizer_files",
        "data.unigram",
        "data.packing",
        "data.global_batch",
        "data.order",
        "data.mixture",
        "data.loader",
        "data.masking",
        "data.count_models",
        "data.stages",
        "inputs.borders",
        "inputs.columns",
        "inputs.paths",
        "inputs.pieces",
        "inputs.places",
        "inputs.rows",
        "inputs.streams",
        "command_line",
        "errors",
        "files",
        "lease",
        "config",
        "options",
        "progress",
    )
}
MAY_IMPORT_DEEPSPEED = {"ds_roberta.training.engine", "ds_roberta.training.device"}


def modules_in(*folders):
    return {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in folders
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
    }


FILES = modules_in("ds_roberta", "preprocessing", "launch")
WITH_BENCHMARKS = FILES | modules_in("benchmarks")


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def is_not_run_by_an_import(node):
    return is_for_types(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imports(statements, is_skipped=lambda node: False):
    """The dotted names that statements import; names imported from a package are tried as its modules."""
    found = set()
    for node in statements:
        if is_skipped(node):
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(modules & WITH_BENCHMARKS.keys() or {node.module})
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            found |= imports(getattr(node, block, ()), is_skipped)
    return found


def statements_of(path):
    return ast.parse(path.read_text(encoding="utf-8")).body


@cache
def all_imports():
    """What each module imports."""
    return {module: imports(statements_of(path)) for module, path in FILES.items()}


@cache
def reaches_deepspeed(module):
    """Whether importing a module imports DeepSpeed."""
    if module not in WITH_BENCHMARKS:
        return module.split(".")[0] == "deepspeed"
    return any(map(reaches_deepspeed, imports(statements_of(WITH_BENCHMARKS[module]), is_not_run_by_an_import)))


def room(module):
    rooms = [name for row in ROOMS for name in row if module == name or module.startswith(f"{name}.")]
    return max(rooms, key=len)


def row(module):
    return next(number for number, rooms in enumerate(ROOMS) if room(module) in rooms)


def test_every_module_has_a_room():
    assert len(FILES) > 25
    for module in FILES:
        assert room(module) != "ds_roberta" or module == "ds_roberta", f"{module} stands in no room: add it to ROOMS"


def test_rooms_import_downward_only():
    for module, names in all_imports().items():
        for imported in names & FILES.keys():
            if room(imported) != room(module) and not {room(imported), room(module)} <= GROUND:
                assert row(imported) > row(module), f"{module} imports {imported}, which is not below it"


def test_preprocessing_and_training_meet_in_the_data_alone():
    for module, imported in all_imports().items():
        ours = {name for name in imported if name.split(".")[0] == "ds_roberta"}
        if room(module) == "preprocessing":
            assert ours <= PREPROCESSING_MAY_IMPORT, module
        elif room(module) != "launch":
            assert not any(name.split(".")[0] == "preprocessing" for name in imported), module


def test_deepspeed_is_imported_in_the_engine_alone():
    for module, imported in all_imports().items():
        if room(module) != "launch" and any(name.split(".")[0] == "deepspeed" for name in imported):
            assert module in MAY_IMPORT_DEEPSPEED


def test_all_but_the_run_is_imported_without_deepspeed():
    reaching = {module for module in FILES if room(module) != "launch" and reaches_deepspeed(module)}
    assert reaching == MAY_IMPORT_DEEPSPEED | {"ds_roberta.training.run"}


def test_unit_tests_that_import_deepspeed_are_skipped_without_it():
    skip = 'pytest.importorskip("deepspeed")'
    for path in sorted((REPOSITORY / "tests/unit").glob("test_*.py")):
        if any(map(reaches_deepspeed, imports(statements_of(path), is_not_run_by_an_import))):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert skip in lines, f"{path.name} imports DeepSpeed: write {skip} above its imports"


def test_models_and_tokenizers_are_opened_in_one_module():
    opening = set()
    for module, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        nodes = ast.walk(ast.parse(text)) if "from_pretrained" in text else ()
        if any(isinstance(node, ast.Attribute) and node.attr == "from_pretrained" for node in nodes):
            opening.add(module)
    assert opening == {"ds_roberta.transformers_folder"}


def test_no_imports_go_in_a_circle():
    at_runtime = {module: imports(statements_of(path), is_for_types) & FILES.keys() for module, path in FILES.items()}
    TopologicalSorter(at_runtime).prepare()  # raises CycleError with the circle


def test_files_stay_short():
    files = [*FILES.values(), *sorted((REPOSITORY / "tests").rglob("*.py")), REPOSITORY / "setup.py"]
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: count for path, count in lines.items() if count > LINES_AT_MOST} == {}


def names_in_the_readmes_tree():
    """Paths of the folders and modules that the tree under "Layout" names."""
    tree = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## Layout")[2].split("```")[1]
    paths, top = set(), ""
    for line in tree.splitlines()[1:]:
        names, text = re.match(r" *(\S+(?: \S+)*)  ?(.*)", line).groups()
        parent = f"{top}/" if line.startswith(" ") else ""
        first, *others = (f"{parent}{name.rstrip('/')}" for name in re.findall(r"\w+(?:/|\.py)", names))
        top = top if parent else first
        for name in re.findall(r"\w+(?:/|\.py)", text):  # inside the row's folder, or beside its module
            inside = f"{first}/{name.rstrip('/')}"
            others.append(inside if (REPOSITORY / inside).exists() else f"{parent}{name.rstrip('/')}")
        paths |= {first, *others}
    return paths


def test_the_documents_name_every_room_and_nothing_else():
    packages = {str(path.parent.relative_to(REPOSITORY)) for path in FILES.values()}
    at_the_top = {str(path.relative_to(REPOSITORY)) for path in FILES.values() if path.stem != "__init__"}
    at_the_top = {path for path in at_the_top if path.count("/") == 1 and not path.startswith("launch/")}
    tree = names_in_the_readmes_tree()
    assert packages | at_the_top <= tree
    assert [path for path in tree if not (REPOSITORY / path).exists()] == []
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = {
        name.rstrip("/") for name in re.findall(r"^\| `([^`]+)` \|", text.partition("## The rooms")[2], re.MULTILINE)
    }
    assert packages - {"ds_roberta"} <= rooms
    assert [room for room in rooms if not list(REPOSITORY.glob(room))] == []
