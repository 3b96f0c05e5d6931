"""Every code block of the documentation is run, or is listed below with the reason why not; every link leads somewhere.

A page is followed from top to bottom, in a folder that looks like a checkout: Python blocks in one namespace, shell
blocks (``bash`` or no language) as they stand. A ``text`` block right below a block that was run is its output, or
its error; ``...`` in it stands for anything. Other ``text`` blocks are pictures of something. In ``console`` blocks,
transcripts, only the options of the typed commands are checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("markdown_it", reason="needs markdown-it-py, which rich brings: pip install -e '.[test]'")
pytest.importorskip("typer")

from markdown_it import MarkdownIt  # noqa: E402
from typer.main import get_command  # noqa: E402

import sfs_triton  # noqa: E402
from sfs_triton import Engine, OutOfDeviceMemory  # noqa: E402
from sfs_triton.cli import main as cli  # noqa: E402
from sfs_triton.decoding.samplers import PRESETS  # noqa: E402
from sfs_triton.models import Transformer  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md", *DOCS]
OTHERS = ["CHANGELOG.md", "SECURITY.md", "sfs_triton/embedded/README.md", "tests/golden/README.md"]
SHELL, OUTPUT = ("", "bash"), ("text", "console")
ADDRESS = "127.0.0.1:8000"  # of the servers that pages start; here they take a free port
TIME_LIMIT = 100  # seconds a shell block may take

# Texts of a page that stand for something smaller here.
STAND_INS = {"docs/inflation.md": {'"llada-8b"': '"toy-512"'}}  # of 16 GB


# ----------------------------------------------------------------------------------- commands that are not run, and why


def check_make(words: list[str]) -> None:
    """The targets are there; says what it would do, which fails for those that are not."""
    done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def check_extras(words: list[str]) -> None:
    """Check that names in brackets are extras of this package."""
    source = (ROOT / "setup.py").read_text()
    for extras in re.findall(r"\[([^\]]*)\]", " ".join(words)):
        for extra in extras.split(","):
            assert re.search(rf'^    "{extra}": ', source, re.MULTILINE), f"setup.py has no extra {extra!r}"


def check_sfs(words: list[str]) -> None:
    """A subcommand takes these options."""
    command, *options = words[1:]
    get_command(cli.app).commands[command].make_context(command, options)


class Parsed(Exception):
    """A program has understood its options, and is not to go on."""


def check_ranks(words: list[str]) -> None:
    """Apply :func:`check_sfs` to the command that torchrun starts."""
    check_sfs(["sfs", *words[words.index("sfs_triton.cli") + 1 :]])


def check_parsed(words: list[str]) -> None:
    """The program's own parser takes these options."""
    module, options = _module(words)
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [module, *options])
        try:
            importlib.import_module(module).main()
        except Parsed as parsed:
            if hasattr(parsed.args[0], "training_script"):
                (found,) = parsed.args
                check_parsed(["python", "-m", found.training_script, *found.training_script_args])
            return
        except SystemExit as refused:
            pytest.fail(f"{shlex.join(words)}: exit code {refused.code}")
    pytest.fail(f"{shlex.join(words)}: parses nothing")


def _module(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and its options."""
    program, *options = words
    if program == "accelerate":
        return "accelerate.commands.launch", options[1:]
    if program in ("sfs-eval", "torchrun"):
        return {"sfs-eval": "sfs_triton.cli.evaluate", "torchrun": "torch.distributed.run"}[program], options
    assert Path(program).name == "python", f"no way to check the options of {program}"
    if options[0] == "-m":
        package = importlib.util.find_spec(options[1]).submodule_search_locations is not None
        return f"{options[1]}.__main__" if package else options[1], options[2:]
    return options[0].removesuffix(".py").replace("/", "."), options[1:]


class Allowed(NamedTuple):
    """Commands that are only checked."""

    command: str  # a regular expression, matched from the command's start
    why: str
    check: Callable[[list[str]], None]


ALLOWED = [
    Allowed(r"make ", "takes minutes, and installs into the checkout", check_make),
    Allowed(r"sfs doctor", "interprets every kernel here, for minutes", check_sfs),
    Allowed(r"pip install ", "needs a network", check_extras),
    Allowed(r"python bench/throughput\.py .*--geometry", "needs a GPU", check_parsed),
    Allowed(r"python -m bench\.gpu", "needs a GPU", check_parsed),
    Allowed(r"python -m bench\.shapes\.inflate", "writes 16 GB", check_parsed),
    Allowed(r"python -m bench\.report", "writes into the checkout", check_parsed),
    Allowed(r"python -m bench\.cost\.cost_model --write-doc", "writes into the checkout", check_parsed),
    Allowed(
        r"python -m bench\.quality\.sweep", "takes an hour; tests/bench/test_sweep.py runs a small one", check_parsed
    ),
    Allowed(
        r"python -m bench\.quality\.quantised",
        "takes minutes; tests/models/test_quantised.py runs a small one",
        check_parsed,
    ),
    Allowed(r"python -m bench\.server\.serve_load", "takes two minutes", check_parsed),
    Allowed(
        r"python -m bench\.server\.soak", "takes half an hour; tests/bench/test_soak.py runs a short one", check_parsed
    ),
    Allowed(r"python -m bench\.server\.determinism", "takes minutes, and writes into the checkout", check_parsed),
    Allowed(r"python -m bench\.server\.reliability", "writes into the checkout", check_parsed),
    Allowed(r"python tests/conformance\.py", "takes minutes; tests/engine/test_conformance.py runs it", check_parsed),
    Allowed(r"torchrun .* -m sfs_triton\.cli ", "tests/distributed/test_parallel.py runs two ranks", check_ranks),
    Allowed(r"(torchrun|accelerate launch) ", "tests/integrations/test_lm_eval.py runs two ranks", check_parsed),
    Allowed(r"sfs-eval .*pretrained=GSAI-ML/", "downloads 16 GB", check_parsed),
    Allowed(r"sfs batch .*--workers", "starts a cluster; tests/integrations/test_ray.py does", check_sfs),
    Allowed(r"sfs chat$", "talks to a terminal; tests/chat/test_chat.py does", check_sfs),
    Allowed(r"sfs serve ", "runs until it is stopped; started where the page goes on to ask it", check_sfs),
]


# ------------------------------------------------------------------------------------------------------ reading pages


class Block(NamedTuple):
    """A fenced code block. ``expected`` is the ``text`` block right below it, which is checked for nothing else."""

    language: str
    source: str
    line: int
    expected: str | None = None


def tokens_of(page: Path) -> list:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks_of(page: Path) -> list[Block]:
    fences = [token for token in tokens_of(page) if token.type == "fence"]
    found: list[Block] = []
    end = -9
    for token in fences:
        first, stop = token.map
        language = token.info.strip()
        if language == "text" and first - end <= 1 and found[-1].language in ("python", *SHELL):
            found[-1] = found[-1]._replace(expected=token.content)
        else:
            found.append(Block(language, token.content, first + 1))
        end = stop
    return found


def commands_of(source: str) -> Iterator[str]:
    """The commands of a shell block, each in one piece."""
    command = ""
    for line in source.splitlines():
        command += line
        if command.endswith("\\"):
            command = command[:-1]
            continue
        try:
            words = shlex.split(command, comments=True)
        except ValueError:  # a quotation that goes on
            command += "\n"
            continue
        if words:
            yield command
        command = ""
    assert not command, f"{command!r} does not end"


def bare(command: str) -> str:
    """A command as it is typed where the environment is active."""
    return re.sub(r"^\.venv/bin/", "", command)


def allowed(command: str) -> Allowed | None:
    return next((entry for entry in ALLOWED if re.match(entry.command, bare(command))), None)


def typed_in(transcript: str) -> list[str]:
    return [line[2:] for line in transcript.splitlines() if line.startswith("$ ")]


def shell_commands(page: Path) -> list[str]:
    """All that a page has its reader type."""
    found = []
    for block in blocks_of(page):
        if block.language in SHELL:
            found += commands_of(block.source)
        elif block.language == "console":
            found += typed_in(block.source)
    return found


def one_space(text: str) -> str:
    return " ".join(text.split())


def says(text: str, expected: str) -> bool:
    parts = (re.escape(one_space(part)) for part in expected.split("..."))
    return re.fullmatch(r"\s*.*\s*".join(parts), one_space(text)) is not None


class Reader:
    """Follow the instructions of a page, in a folder that looks like a checkout."""

    def __init__(self, page: Path, folder: Path, stack: ExitStack):
        self.page, self.folder, self.stack = page, folder, stack
        self.name = page.relative_to(ROOT).as_posix()
        self.space = {"__name__": "page"}
        self.address = ADDRESS
        for entry in ("bench", "docs", "kernels", "sfs_triton", "tests", "Makefile", "setup.py"):
            (folder / entry).symlink_to(ROOT / entry)
        (folder / ".venv").symlink_to(sys.prefix)

    def local(self, text: str) -> str:
        for written, meant in STAND_INS.get(self.name, {}).items():
            text = text.replace(written, meant)
        return text.replace(ADDRESS, self.address)

    def follow(self, blocks: list[Block]) -> None:
        for index, block in enumerate(blocks):
            where = f"{self.name}:{block.line}"
            if block.language == "python":
                self.compare(where, block, self.run_python(block))
            elif block.language in SHELL:
                asked_later = any(ADDRESS in later.source for later in blocks[index + 1 :])
                self.compare(where, block, self.run_shell(where, block, asked_later))
            elif block.language == "console":
                for command in typed_in(block.source):
                    self.skip(where, command)
            else:
                assert block.language in OUTPUT, f"{where}: nothing runs a block of {block.language!r}"

    def compare(self, where: str, block: Block, said: str) -> None:
        if block.expected is not None and not torch.cuda.is_available():  # where bfloat16 is the default
            assert says(said, block.expected), f"{where} says\n{said}"

    def run_python(self, block: Block) -> str:
        out = io.StringIO()
        code = compile("\n" * block.line + self.local(block.source), str(self.page), "exec", dont_inherit=True)
        try:
            with redirect_stdout(out):
                exec(code, self.space)
        except Exception as error:
            line = "".join(traceback.format_exception_only(error))
            if block.expected is None or not says(out.getvalue() + line, block.expected):
                raise
            out.write(line)
        return out.getvalue()

    def run_shell(self, where: str, block: Block, asked_later: bool) -> str:
        script = []
        for command in commands_of(block.source):
            if bare(command).startswith("sfs serve ") and asked_later:
                self.serve(command)
            elif allowed(command) or self.elsewhere(command):
                self.skip(where, command)
            else:
                script.append(self.local(command))
        if not script:
            return ""
        done = subprocess.run(
            ["bash", "-c", "\n".join(["set -eu", *script])],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if block.expected else subprocess.PIPE,
            text=True,
            timeout=TIME_LIMIT,
        )
        fails = (block.expected or "").startswith("error:")
        assert (done.returncode != 0) == fails, f"{where}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def elsewhere(self, command: str) -> bool:
        """Return True if the README repeats a command from a page under docs/."""
        return self.name == "README.md" and any(bare(command) in shell_commands(page) for page in DOCS)

    def skip(self, where: str, command: str) -> None:
        """Only check a command that is not run."""
        entry = allowed(command)
        if entry is None and self.elsewhere(command):
            return
        assert entry is not None, f"{where}: {command!r} is neither run nor in ALLOWED"
        entry.check(shlex.split(bare(command), comments=True))

    def environment(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SFS_API_KEY")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{mine.get('PATH', '')}"
        return mine | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

    def serve(self, command: str) -> None:
        """Start a page's server on a free port, for the rest of the page."""
        words = shlex.split(re.sub(r"--port \d+", "--port 0", command), comments=True)
        process = subprocess.Popen(
            words, cwd=self.folder, env=self.environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.stack.callback(process.wait, 30)
        self.stack.callback(process.terminate)
        patience = threading.Timer(TIME_LIMIT, process.kill)
        self.stack.callback(patience.cancel)
        patience.start()
        said = process.stderr.readline()
        found = re.search(r"http://([\d.]+:\d+)/", said)
        assert found, f"{command}: {said}{process.stderr.read()}"
        self.address = found[1]


HEAVY = {"evaluation.md", "cost-model.md", "faq.md", "quantised.md"}  # sfs-eval twice, predictions anew, whole models


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.name in HEAVY else []) for page in PAGES],
    ids=[page.relative_to(ROOT).as_posix() for page in PAGES],
)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        Reader(page, tmp_path, stack).follow(blocks_of(page))


def test_the_list_holds_nothing_that_no_page_needs():
    typed = [command for page in PAGES for command in shell_commands(page)]
    for entry in ALLOWED:
        assert any(re.match(entry.command, bare(command)) for command in typed), f"no page has {entry.command!r}"


def test_a_block_that_nobody_knows_is_found(tmp_path):
    page = ROOT / "docs" / "index.md"
    with ExitStack() as stack:
        reader = Reader(page, tmp_path, stack)
        with pytest.raises(AssertionError, match="nothing runs a block of 'rust'"):
            reader.follow([Block("rust", "fn main() {}", 1)])
        with pytest.raises(AssertionError, match="neither run nor in ALLOWED"):
            reader.follow([Block("console", "$ rm -r /", 1)])
        with pytest.raises(AssertionError, match="says"):
            reader.follow([Block("python", "print(1)", 1, "2")])
        with pytest.raises(ZeroDivisionError):
            reader.follow([Block("python", "1 / 0", 1, "ValueError: no")])
        with pytest.raises(AssertionError, match="exit code 1"):
            reader.follow([Block("bash", "false", 1)])
        with pytest.raises(pytest.fail.Exception, match="exit code 2"):
            reader.follow([Block("bash", "python -m bench.report --nothing", 1)])


# ------------------------------------------------------------------------------------------------- links and tables


MARKDOWN = [*PAGES, *(ROOT / name for name in OTHERS)]


def slug(heading: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(page: Path) -> set[str]:
    tokens = tokens_of(page)
    after = (tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open")
    return {slug("".join(part.content for part in inline.children)) for inline in after}


def links(page: Path) -> Iterator[str]:
    for token in tokens_of(page):
        for part in token.children or ():
            target = part.attrGet("href") or part.attrGet("src")
            if target and not re.match(r"[a-z]+:", target):
                yield target


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_fences(page):
    assert not [token.map for token in tokens_of(page) if token.type == "code_block"], "fence indented code"
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link} is no file"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in headings(target), f"{link}: there is no such heading"


def table_under(page: Path, heading: str) -> list[list[str]]:
    """The first table below a heading, cell by cell."""
    text = page.read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1]
    rows = [line for line in text.split("\n\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_table_of_presets():
    head, _, *rows = table_under(ROOT / "docs" / "samplers.md", "Presets of `SlowFast`")
    names = [cell.strip("`") for cell in head[1:]]
    assert names == list(PRESETS)
    differ = {
        field.name
        for field in fields(PRESETS["paper"])
        if len({getattr(preset, field.name) for preset in PRESETS.values()}) > 1
    }
    assert {row[0].strip("`") for row in rows} == differ
    for setting, *cells in rows:
        wanted = [getattr(PRESETS[name], setting.strip("`")) for name in names]
        assert [cell.strip("`") for cell in cells] == [str(value) for value in wanted], setting


def test_every_public_name_has_its_reference():
    listed = re.findall(r"^::: sfs_triton\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    lazy = [f"integrations.transformers.{name}" for name in ("accelerate", "custom_generate")]
    assert sorted(listed) == sorted([*sfs_triton.__all__, *lazy])


def test_the_readme_and_the_site_list_every_page():
    listed = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    site = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS:
        assert f"docs/{page.name}" in listed, f"README.md does not link to docs/{page.name}"
        assert f": {page.name}\n" in site, f"mkdocs.yml does not have {page.name} in its nav"


def test_files_that_pages_name_are_there():
    """On the pages that walk through the code, everything that looks like a path of this repository is one."""
    for name in ("docs/adding-a-model.md", "docs/adding-a-sampler.md", "kernels/README.md"):
        for path in re.findall(r"`((?:[\w-]+/)+[\w.-]*)`", (ROOT / name).read_text()):
            assert (ROOT / path).exists(), f"{name}: {path}"


def test_out_of_memory_as_the_faq_has_it(embedded):
    """A cache that no address space holds costs nothing to ask for."""
    large = Engine(Transformer(replace(embedded.spec, n_layers=2**36), embedded.model.weights), embedded.text)
    with pytest.raises(OutOfDeviceMemory) as caught:
        large.generate("15,44,79,50", gen_length=32, cache="region")
    said = re.sub(r"[\d.]+", "N", str(caught.value))
    assert said in re.sub(r"[\d.]+", "N", one_space((ROOT / "docs" / "faq.md").read_text()))


# ---------------------------------------------------------------------------------------------------------- the site


def test_site_builds(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason=f"the site needs {module}: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        outside = re.findall(r'<(?:script|img|iframe)[^>]*src="?https?://[^">]*', page.read_text())
        outside += re.findall(r'<link[^>]*rel="?(?:stylesheet|preconnect)[^>]*href="?https?://[^">]*', page.read_text())
        assert not outside, f"{page.name} asks others for {outside}"
    text = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in sfs_triton.__all__:
        assert f'id="sfs_triton.{name}"' in text, name
    assert ":class:" not in text and ":meth:" not in text
