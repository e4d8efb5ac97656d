"""The documentation keeps up with the code: names, arguments, links, commands and messages."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from peft import PeftConfig


ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
PUBLIC = json.loads((ROOT / "tests/golden/public_names.json").read_text())
LINK = re.compile(r"\]\(([^)\s]+)\)")
UNEXPLAINED = {"self", "cls", "args", "kwargs"}


def public_objects():
    """Every public name once, by the shortest way to import it."""
    seen = {}
    for module, names in sorted(PUBLIC.items(), key=lambda entry: entry[0].count(".")):
        for name in names:
            value = getattr(importlib.import_module(module), name)
            if name != "__version__" and not any(known is value for known in seen.values()):
                seen[f"{module}.{name}"] = value
    return seen


OBJECTS = public_objects()


def inherited_parameters(value):
    """What a configuration takes over from PEFT or transformers is explained there."""
    if inspect.isclass(value):
        for parent in value.__mro__[1:]:
            if not parent.__module__.startswith("peft_moe") and parent is not object:
                yield from inspect.signature(parent.__init__).parameters
    if inspect.isclass(value) and issubclass(value, PeftConfig):
        yield from (field.name for field in dataclasses.fields(PeftConfig))


def test_reference_lists_what_is_public():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference/api.md").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == set(OBJECTS)


@pytest.mark.parametrize("name", [name for name, value in OBJECTS.items() if callable(value)])
def test_docstring_explains_every_argument(name):
    value = OBJECTS[name]
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    if inspect.isclass(value) and "__init__" not in vars(value):
        return
    parameters = {
        parameter.name
        for parameter in inspect.signature(value).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    missing = [
        entry
        for entry in sorted(parameters - UNEXPLAINED - set(inherited_parameters(value)))
        if not re.search(rf"\b{entry}\b", text)
    ]
    assert not missing, f"the docstring of {name} does not mention {missing}"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


def test_site_lists_every_page():
    listed = set(re.findall(r"\S+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_commands_of_the_documentation_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        shells = "\n".join(re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
        commands = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+)", shells, re.MULTILINE)
        assert set(commands) <= targets, f"{page.name} names a target that the Makefile lacks"
        for script in re.findall(r"python ((?:examples|benchmarks|tests)/[\w/.]+\.py)", text):
            assert (ROOT / script).is_file(), f"{page.name} names {script}"


def test_python_of_the_documentation_compiles():
    for page in PAGES:
        for number, code in enumerate(
            re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        ):
            session = doctest.DocTestParser().get_examples(code)
            for source in [example.source for example in session] or [code]:
                compile(source, f"{page.name}, block {number}", "exec")


def test_messages_of_troubleshooting_are_said_by_the_package():
    """Messages of others begin with their name."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "src").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    said = [node.value for node in nodes if isinstance(node.value, str)]
    quoted = re.findall(r"^### `(.+)`$", (ROOT / "docs/howto/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    assert [message for message in quoted if not any(message in text for text in said)] == []
