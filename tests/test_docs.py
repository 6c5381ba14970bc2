"""What README and docs/ tell a reader to type: commands that parse, programs that run."""

import argparse
import configparser
import importlib
import itertools
import re
import shlex
import shutil
import sys
from pathlib import Path

import jax
import pytest
from tiny_run import make_config, patch_tiny_models, write_photos, write_run

from cbam_jax import command_line, run_summary
from cbam_jax.__main__ import COMMANDS
from cbam_jax.config_files import read_config_file

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
SCRIPTS = {"train.py": "cbam_jax.training", "evaluate.py": "cbam_jax.runs"}
# ml_collections loads a config's file by a method that Python 3.12 drops and it replaces there.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
# Programs of others, whose flags are theirs.
OTHERS = {"pytest", "ruff", "pyright", "pre-commit", "sphinx-build"}
OTHERS |= {"cd", "export", "git", "source"}


def blocks(page, *languages):
    """The fenced blocks of a page in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [text for language, text in found if language in languages]


def commands(page):
    """The commands of a page's blocks without a language."""
    for block in blocks(page, "", "bash"):
        # What stands in brackets may be left out.
        yield from cut(re.sub(r"(?<= )\[(--[^]]+)\]", r"\1", block))


def cut(text):
    """The commands of some lines, joined and cut as a shell does, without their environment."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield list(itertools.dropwhile(re.compile("[A-Z_]+=").match, words[:end]))
            words = words[end + 1 :]


class ParsedError(Exception):
    """Carries what a command made of its flags, out of the command."""


def parse(module, arguments, monkeypatch):
    """The flags of a command as it reads them, and the rest; nothing of it is run."""
    names = ("parse_known_args", "parse_known_intermixed_args")
    whole = {name: getattr(argparse.ArgumentParser, name) for name in names}

    def leaving(name):
        def parse_and_leave(parser, *given, **options):
            # Inside it parsers, also of subcommands, are called likewise.
            with monkeypatch.context() as inner:
                for other in names:
                    inner.setattr(argparse.ArgumentParser, other, whole[other])
                raise ParsedError(whole[name](parser, *given, **options))

        return parse_and_leave

    for name in names:
        monkeypatch.setattr(argparse.ArgumentParser, name, leaving(name))
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setattr(command_line, "keep_compiled_programs", lambda: None)
    with pytest.raises(ParsedError) as parsed:
        importlib.import_module(module).main()
    return parsed.value.args[0]


def check_own(module, arguments, monkeypatch):
    flags, rest = parse(module, arguments, monkeypatch)
    read_config_file(getattr(flags, "config", None) or "default", rest)


def own_module(words):
    """The module of a command of ours, and its arguments; None for another's command."""
    if words[0] == "cbam-jax":
        return COMMANDS[words[1]][0], words[2:]
    if words[:3] == ["python", "-m", "cbam_jax"]:
        return COMMANDS[words[3]][0], words[4:]
    if words[:2] == ["python", "-m"] and words[2].startswith("cbam_jax."):
        name = words[2]
        is_wing = (ROOT / name.replace(".", "/")).is_dir()
        return name + ".__main__" * is_wing, words[3:]
    if words[0] == "python" and words[1] in SCRIPTS:
        return SCRIPTS[words[1]], words[2:]
    return None


def check_foreign(words):
    """A program of ours outside the package, an installation, or a program of others."""
    if words[:2] == ["taskset", "-c"]:
        words = words[3:]
    if words[0] == "python" and words[1].endswith(".py"):
        options = [word for word in words[2:] if word.startswith("--")]
        flags = {word.partition("=")[0] for word in options if not word.startswith("--config.")}
        text = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
        text += (ROOT / "cbam_jax/benchmark/flags.py").read_text()
        assert (ROOT / words[1]).is_file()
        assert [flag for flag in flags if f'"{flag}"' not in text] == []
    elif words[:2] == ["pip", "install"]:
        check_extras(" ".join(words))
    else:
        others = words[0] in OTHERS or words[:2] in (["python", "-m"], ["python3", "-m"])
        assert others or (ROOT / words[0]).is_file(), words


def check_extras(text):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for names in re.findall(r"\.\[([^\]]+)\]|cbam_jax\[([^\]]+)\]", text):
        for name in "".join(names).split(","):
            assert name in setup["options.extras_require"], text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_one_that_its_program_takes(page, monkeypatch):
    for words in commands(page):
        own = own_module(words)
        if own is None:
            check_foreign(words)
        else:
            with monkeypatch.context() as patch:
                check_own(*own, patch)


def test_a_command_with_a_wrong_flag_or_field_would_be_seen(monkeypatch):
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        check_own("cbam_jax.hub", ["export", "runs/mine"], patch)
    with pytest.raises(ValueError, match="no_such"), monkeypatch.context() as patch:
        check_own("cbam_jax.training", ["--config=default", "--workdir=w", "--no_such=1"], patch)
    arguments = ["--config=default", "--workdir=w", "--config.train.stepz=1"]
    with pytest.raises(ValueError, match="stepz"), monkeypatch.context() as patch:
        check_own("cbam_jax.training", arguments, patch)
    with pytest.raises(AssertionError):
        check_foreign(["pip", "install", "-e", ".[no_such]"])


@pytest.mark.parametrize("data", ["./photos/", "my photos.csv", "synthetic_garments/quickstart"])
@pytest.mark.parametrize("program", ["train.py", "cbam-jax"])
def test_what_a_run_says_to_type_next_can_be_typed(data, program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    lines = run_summary.next_commands("runs/my run", data).splitlines()
    told = list(cut("\n".join(line.partition(": ")[2] for line in lines)))
    assert len(told) == (4 if "garments" in data else 2)
    for words in told:
        with monkeypatch.context() as patch:
            check_own(*own_module(words), patch)


def test_what_a_run_with_ones_own_model_says_to_type_next_trusts_it():
    drawn = "synthetic_garments/quickstart"
    plain, own = (run_summary.next_commands("w", drawn, m) for m in ("resnet18", "mine:Patches"))
    assert own.replace("CBAM_JAX_TRUST=mine:Patches ", "") == plain
    told = re.split(": | && ", own.replace("\n", " && "))
    trusting = [line for line in told if line.startswith("CBAM_JAX_TRUST=mine:Patches cbam-jax ")]
    assert [line.split()[2] for line in trusting] == ["evaluate", "catalogue", "catalogue"]
    block = run_summary.next_commands("w", drawn, "resnet18", "mine:ECA")
    assert block == own.replace("mine:Patches", "mine:ECA")


PROGRAMS = [
    pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, text in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("text", PROGRAMS)
def test_every_program_of_a_page_compiles_and_imports_what_there_is(text):
    compile(text, "page", "exec")
    for module, names in re.findall(r"^from (cbam_jax[\w.]*) import (.+)$", text, re.M):
        found = importlib.import_module(module)
        assert [name for name in names.split(", ") if not hasattr(found, name)] == []


def test_a_part_of_ones_own_takes_thirty_lines_at_most():
    programs = blocks(ROOT / "docs" / "guides" / "extending.md", "python")
    assert len(programs) == 5  # A loss, an attention block, an encoder, a dataset, a schedule.
    assert max(len(text.splitlines()) for text in programs) <= 30


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory):
    """A folder as after README's first commands: runs/quickstart, and photos."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch_tiny_models(patch)
        manifest = write_photos(folder)
        write_run(folder / "runs" / "quickstart", make_config(manifest))
        (folder / "drawn" / "sweater").mkdir(parents=True)
        for i in range(2):
            shutil.copy(
                folder / f"test_coat_{2 * i + 1}.jpg", folder / f"drawn/sweater/0000_{i}.jpg"
            )
        yield folder


def run_where_it_can(program):
    """A program with the mark of the tests that it is run with; others' libraries come late."""
    (text,) = program.values
    mark = pytest.mark.torch if "import equinox" in text else pytest.mark.slow
    return pytest.param(text, id=program.id, marks=mark)


@pytest.mark.parametrize("text", list(map(run_where_it_can, PROGRAMS)))
def test_every_program_of_a_page_runs_as_it_stands(text, monkeypatch, readers_folder):
    if "import equinox" in text:
        pytest.importorskip("equinox", reason="a library of others, which nothing here needs")
    monkeypatch.chdir(readers_folder)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # As JAX comes.
        exec(compile(text, "page", "exec"), {"__name__": "page"})
