"""Who imports whom, what must stay small, and that what is written twice says the same."""

import ast
import importlib
import re

import pytest
import torch
from conftest import ROOT, SHARING
from diffusers import DDPMScheduler
from scripts import SCRIPTS as FILES_OF_SCRIPTS

import sft_kl
from benchmarks import sft_weights, zoo_eval

SCRIPTS = {file.removesuffix(".py") for file in FILES_OF_SCRIPTS}
COMMANDS = {"evaluate", "human_eval"}
FOLDERS = ("common", "harness", "evaluation", "zoo", "benchmarks")
IN_ROOT = {path.stem for path in ROOT.glob("*.py")} - {"installed"}


def files(*folders: str) -> list[str]:
    """Python files in these folders of the repository, as paths from its root."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def imported(source: str) -> set[str]:
    """The first parts of the names of all modules that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_imported_finds_every_way_to_import():
    source = (
        "import a.b as c, d\ndef f():\n    from e import g\nfrom . import h\nfrom i.j import k\n"
    )
    assert imported(source) == {"a", "d", "e", "i"}


def test_every_script_is_in_the_table_of_scripts():
    assert IN_ROOT == SCRIPTS | COMMANDS


@pytest.mark.parametrize("path", [*files(*FOLDERS), *(f"{name}.py" for name in sorted(IN_ROOT))])
def test_nothing_but_tests_imports_a_script(path):
    assert not imported((ROOT / path).read_text()) & IN_ROOT


@pytest.mark.parametrize("path", files("common"))
def test_common_imports_nothing_of_the_project(path):
    assert not imported((ROOT / path).read_text()) & {*FOLDERS, "tests"} - {"common"}


@pytest.mark.parametrize("path", files("harness"))
def test_harness_imports_common_alone(path):
    own = {*FOLDERS, "tests"} - {"common", "harness"}
    assert not imported((ROOT / path).read_text()) & own


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_import_common_and_harness_alone(script):
    own = {*FOLDERS, "tests"} - {"common", "harness"}
    assert not imported((ROOT / f"{script}.py").read_text()) & own


def names_of_scripts(source: str) -> list[str]:
    """Names of scripts in the code: not in comments, docstrings and paths of pages in docs/."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            text = body[0].value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                text.value = ""
    code = re.sub(r"docs/[\w/]+\.md", "", ast.unparse(tree))
    words = "|".join(sorted(SCRIPTS, key=len, reverse=True))
    return re.findall(rf"(?<![a-z0-9])(?:{words})(?![a-z0-9])", code, re.IGNORECASE)


def test_names_of_scripts_are_found_in_code_alone():
    source = '"""dpok"""\n# ddpo\nDDPO_FLAGS = 1\n\ndef f():\n    """rwr"""\n    '
    source += 'fail("see docs/rwr.md, rwr.py")\n    return "xrwr", sft_kl\n'
    assert names_of_scripts(source) == ["DDPO", "rwr", "sft_kl"]


@pytest.mark.parametrize("path", files("harness"))
def test_harness_names_no_script(path):
    assert not names_of_scripts((ROOT / path).read_text())


def questions_about_flags(source: str) -> list[str]:
    """Code that asks which flags a script has."""
    all_flags, found = r"\b(asdict|vars|fields)\(|__dataclass_fields__|__dict__", []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            of_in = [isinstance(op, ast.In | ast.NotIn) for op in node.ops]
            asked = [right for right, is_in in zip(node.comparators, of_in) if is_in]
            is_question = any(re.search(all_flags, ast.unparse(right)) for right in asked)
        elif isinstance(node, ast.Call):
            is_question = re.match(r"(hasattr|getattr)\((self\._?)?args,", ast.unparse(node))
        else:
            continue
        if is_question:
            found.append(ast.unparse(node))
    return found


def test_questions_about_flags_are_found():
    found = questions_about_flags(
        "if 'prompt' in asdict(args) and x not in vars(self._args): pass\n"
        "for name, value in asdict(args).items(): hasattr(thing, 'load')\n"
        "y = getattr(args, 'tasks', None), hasattr(self._args, 'tasks'), x in (1, 2)\n"
    )
    assert sorted(found) == [
        "'prompt' in asdict(args)",
        "getattr(args, 'tasks', None)",
        "hasattr(self._args, 'tasks')",
        "x not in vars(self._args)",
    ]


@pytest.mark.parametrize("path", files("harness"))
def test_harness_asks_for_no_flag(path):
    assert not questions_about_flags((ROOT / path).read_text())


def nesting(node: ast.AST) -> int:
    """Levels of for, while, if, with and try below it; an elif is on the level of its if."""
    deepest, blocks = 0, (ast.For, ast.While, ast.If, ast.With, ast.Try)
    for child in ast.iter_child_nodes(node):
        both_if = isinstance(node, ast.If) and isinstance(child, ast.If)
        is_elif = both_if and child.col_offset == node.col_offset
        deepest = max(deepest, nesting(child) + (isinstance(child, blocks) and not is_elif))
    return deepest


def test_nesting_counts_blocks():
    source = "for a in b:\n  if a:\n    pass\n  elif c:\n    with d:\n      e = 1 if f else 2\n"
    assert nesting(ast.parse(source)) == 3
    assert nesting(ast.parse("if a:\n  pass\nelse:\n  if b:\n    pass\n")) == 2


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_main_of_a_script_fits_in_a_head(script):
    body = parsed(f"{script}.py").body
    (main,) = [node for node in body if getattr(node, "name", None) == "main"]
    lines, levels = main.end_lineno - main.lineno + 1, nesting(main)
    assert lines <= 130, f"main() of {script}.py has {lines} lines"
    assert levels <= 5, f"main() of {script}.py has {levels} levels of nesting"


@pytest.mark.parametrize("name", sorted(SCRIPTS | COMMANDS))
def test_lines_of_a_script_are_at_most_100_wide(name):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert not [number for number, line in enumerate(lines, start=1) if len(line) > 100]


def test_run_is_small():
    """At most 12 names that a script can use, and 300 lines."""
    path = "harness/run.py"
    (run,) = [node for node in parsed(path).body if getattr(node, "name", None) == "Run"]
    functions = {node.name: node for node in run.body if isinstance(node, ast.FunctionDef)}
    attributes = {
        node.attr
        for node in ast.walk(functions["__init__"])
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }
    public = {name for name in functions.keys() | attributes if not name.startswith("_")}
    assert {"iterations", "device"} <= public and len(public) <= 12, sorted(public)
    assert len((ROOT / path).read_text().splitlines()) <= 300


@pytest.mark.parametrize("module", sorted(SCRIPTS | COMMANDS))
def test_all_zoo_presets_sample_as_the_benchmarks_do(module):
    preset = importlib.import_module(module).PRESETS["zoo"]
    found = preset.num_inference_steps, preset.guidance_scale, preset.eta
    assert found == (zoo_eval.NUM_INFERENCE_STEPS, zoo_eval.GUIDANCE_SCALE, zoo_eval.ETA)


def test_weights_of_the_benchmark_are_those_of_sft_kl():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(1, 1000)
    for weighting, found in sft_weights.step_weights(scheduler.alphas_cumprod.double(), t).items():
        expected = sft_kl.step_weights(scheduler, t, weighting)
        torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=0)


def test_groups_name_tests_that_are_there():
    files = ROOT / "tests/test_scripts.py", ROOT / "tests/faults/test_faults.py"
    text = "".join(file.read_text() for file in files)
    for tests in SHARING.values():
        assert all(f"def {name}(" in text for name in tests)
