"""The reference of components: the page is what the plugins say, every entry is whole, every example runs, every word finds its way."""

from __future__ import annotations

import doctest
import itertools
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from distily.catalogue import PAGE, command, page, read
from distily.cli import main
from distily.config import resolve
from distily.plugins import Offered, Plugins, load

PAGE_FILE = Path(__file__).parent.parent / "docs" / "objectives.md"
BUILT_IN = Plugins(tuple(package for package in load().packages if package.distribution == "distily"))
PLUGINS = PAGE_FILE.parent.parent / "plugins"
MODULES = sorted(".".join(path.relative_to(PLUGINS).with_suffix("").parts) for path in PLUGINS.rglob("*.py"))
ENTRIES = [entry for package in BUILT_IN.packages for entry in package.components if entry.kind in PAGE]


def everything(entry: Offered) -> str:
    return f"{entry.kind}-{entry.name}"


def test_the_page_is_what_the_plugins_say() -> None:
    """Write it anew with ``distily components --markdown > docs/objectives.md``."""
    assert PAGE_FILE.read_text(encoding="utf-8") == page(BUILT_IN) + "\n"


@pytest.mark.parametrize("entry", ENTRIES, ids=everything)
def test_an_entry_is_whole(entry: Offered) -> None:
    documentation = read(entry.factory.__doc__ or "", entry.options)
    assert documentation.summary.endswith((".", "?"))
    assert set(documentation.meanings) == set(entry.options)
    if entry.kind == "objectives":
        description = entry.factory.description
        assert description.formula
        assert documentation.source or description.source
        assert "Shapes:" in documentation.text
        assert "Range" in documentation.text
        assert documentation.example


@pytest.mark.parametrize("entry", ENTRIES, ids=everything)
def test_the_command_of_an_entry_is_a_valid_one(entry: Offered) -> None:
    words = shlex.split(command(entry))
    values: dict[str, object] = {"teacher": "demo", "output_dir": "x", "objectives": ["forward_kl"]}
    objectives = [word for flag, word in itertools.pairwise(words) if flag == "--objective"]
    values |= {"objectives": objectives} if objectives else {}
    values |= {"combiner": words[words.index("--combiner") + 1]} if "--combiner" in words else {}
    load().check(resolve(values))


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    assert doctest.testmod(import_module(module)).failed == 0


def test_every_example_of_the_page_is_among_them() -> None:
    assert {entry.factory.__module__ for entry in ENTRIES} <= set(MODULES)


def test_aliases_lead_to_one_component() -> None:
    for kind in PAGE:
        names = [name for entry in ENTRIES if entry.kind == kind for name in (entry.name, *entry.aliases)]
        assert sorted(names) == sorted(set(names))


def shown(*words: str) -> str:
    result = CliRunner().invoke(main, ["components", *words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("kl", "forward_kl"),
        ("KL", "forward_kl"),
        ("fkl", "forward_kl"),
        ("kld", "forward_kl"),
        ("rkl", "reverse_kl"),
        ("mi", "mutual_information"),
        ("ce", "cross_entropy"),
        ("tlsd", "token_scaled"),
    ],
)
def test_the_words_of_the_field_lead_to_the_canonical_name(alias: str, name: str) -> None:
    assert shown(alias).startswith(f"{alias} is an alias of {name}.\nobjective {name}\n")


def test_an_entry_on_the_command_line_is_the_one_on_the_page() -> None:
    entry = shown("jsd").partition("\n\n")[2].strip()
    assert f"### jsd\n\n{entry}" in page(BUILT_IN)
    assert "option `beta` (a number in" in entry


@pytest.mark.parametrize(("word", "name"), [("Hinton", "forward_kl"), ("2306.13649", "jsd"), ("attention", "self_relation")])
def test_other_words_are_searched_for(word: str, name: str) -> None:
    assert f"  {name}" in shown(word)
    assert len(shown(word).splitlines()) < len(shown("objectives").splitlines())


def test_a_word_that_finds_nothing_is_the_users_mistake() -> None:
    result = CliRunner().invoke(main, ["components", "forwad_kl"])
    assert result.exit_code == 2
    assert "did you mean 'forward_kl'?" in result.output


def test_the_page_by_the_command_line() -> None:
    assert shown("--markdown").startswith(page(BUILT_IN)[:400])


@pytest.mark.parametrize(
    ("text", "meanings"),
    [
        ("``a``, in (0, 1): share. ``b``: of what ``a`` takes.", {"a": "in (0, 1): share.", "b": "of what ``a`` takes."}),
        (
            "\n    a: the share.\n        Default 0.5. More is slower.\n    b: which.",
            {"a": "the share. More is slower.", "b": "which."},
        ),
        ("``a`` and ``b``: bounds.", {"a": "bounds.", "b": "bounds."}),
        ("``a`` α, a power. ``b``.", {"a": "α, a power.", "b": ""}),
        ("those of ``kl``.", {"a": "as in ``kl``.", "b": "as in ``kl``."}),
    ],
)
def test_what_is_said_of_an_option(text: str, meanings: dict[str, str]) -> None:
    for before in ("\n\n", " "):  # in a paragraph of its own, or at the end of one
        parts = read(f"Computes.{before}Options: {text}{before}Source: Somebody 2020.\n\n>>> 1\n1\n", ("a", "b"))
        assert (parts.summary, parts.meanings, parts.source) == ("Computes.", meanings, "Somebody 2020")
        assert parts.example == ">>> 1\n1"


def test_an_entry_costs_no_heavy_import() -> None:
    import subprocess

    code = "from distily.catalogue import page; from distily.plugins import load; page(load())"
    code += (
        "; import sys; print(*(name for name in ('ot', 'transformers', 'lm_eval', 'scipy', 'datasets') if name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
