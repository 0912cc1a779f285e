"""What could be imported from version 0.1 can still be imported from there; what moved says where to.

`public_names_0_1.json` has the public names that each module defined then.
"""

import importlib
import json
import warnings
from pathlib import Path

import pytest

import megatron_mimo
from megatron_mimo import moved

NAMES_OF_0_1 = json.loads(Path(__file__).with_name("public_names_0_1.json").read_text())
EVERY_NAME = [(module, name) for module, names in NAMES_OF_0_1.items() for name in names]
TO_MEND = (
    "add a line to megatron_mimo/moved/__init__.py (MODULES where a module is gone, NAMES where one name went "
    "elsewhere, REMOVED where nothing takes its place)"
)


def short(module: str) -> str:
    return module.removeprefix("megatron_mimo.")


def imported(module: str, name: str) -> tuple[object, list[warnings.WarningMessage]]:
    """What ``from module import name`` gives, and what it warns of."""
    here: dict[str, object] = {"__name__": "a_program_of_ones_own"}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        exec(f"from {module} import {name}", here)
    return here[name], [warning for warning in heard if "has moved to" in str(warning.message)]


@pytest.mark.parametrize(("module", "name"), EVERY_NAME, ids=lambda part: str(part))
def test_a_name_of_0_1_is_where_it_was_or_says_where_it_is(module: str, name: str) -> None:
    if (short(module), name) in moved.REMOVED:
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(importlib.import_module(module), name)
        return
    try:
        found, heard = imported(module, name)
    except ImportError as error:
        pytest.fail(f"{module}.{name} is gone ({error}): {TO_MEND}", pytrace=False)
    home = moved.NAMES.get((short(module), name), moved.MODULES.get(short(module)))
    if not heard:
        assert name in vars(importlib.import_module(module)) or module in ("megatron_mimo", "megatron_mimo.training")
        return
    called = moved.RENAMED.get((short(module), name), name)
    assert found is getattr(importlib.import_module(f"megatron_mimo.{home}"), called)
    assert {warning.category for warning in heard} == {DeprecationWarning}
    assert f"megatron_mimo.{short(module)}.{name} has moved to megatron_mimo.{home}.{called}" in str(heard[0].message)
    # Python shows a DeprecationWarning where the program itself imports the name.
    assert "importlib" not in heard[0].filename


@pytest.mark.parametrize("module", moved.MODULES)
def test_each_module_of_the_table_gives_all_its_names_from_elsewhere(module: str) -> None:
    for name in NAMES_OF_0_1[f"megatron_mimo.{module}"]:
        if (module, name) not in moved.REMOVED:
            _, heard = imported(f"megatron_mimo.{module}", name)
            assert heard, name


def test_the_tables_hold_names_of_0_1_alone() -> None:
    assert {f"megatron_mimo.{module}" for module in moved.MODULES} <= NAMES_OF_0_1.keys()
    known = {(short(module), name) for module, name in EVERY_NAME}
    assert moved.NAMES.keys() | moved.REMOVED.keys() | moved.RENAMED.keys() <= known


def test_a_module_that_is_there_hides_the_one_that_moved() -> None:
    folder = Path(moved.__file__).parent
    for path in folder.rglob("*.py"):
        if path.stem == "__init__":
            continue
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        assert module in moved.MODULES, f"{path} has no line in MODULES: remove it"
        there = folder.parent.joinpath(*module.split("."))
        assert not there.with_suffix(".py").exists() and not there.is_dir(), f"{there} is back: remove {path}"


def test_importing_an_old_module_warns_of_nothing_until_a_name_is_used() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        widths = importlib.import_module("megatron_mimo.widths")
    with pytest.warns(DeprecationWarning, match=r"megatron_mimo\.modality\.fit\.input_width.*version 0\.3"):
        _ = widths.input_width


def test_a_module_that_moved_says_what_takes_the_place_of_a_name_that_is_gone() -> None:
    batch = importlib.import_module("megatron_mimo.batch")
    with pytest.raises(AttributeError, match=r"no attribute 'check_labels' any more: .*megatron_mimo\.check"):
        _ = batch.check_labels


@pytest.mark.parametrize("name", ["no_such_name", "_private", "__wrapped__"])
def test_other_names_are_absent(name: str) -> None:
    cpu = importlib.import_module("megatron_mimo.cpu")
    with pytest.raises(AttributeError, match=f"'megatron_mimo.cpu' has no attribute '{name}'"):
        getattr(cpu, name)
    with pytest.raises(ImportError, match=name):
        exec(f"from megatron_mimo.cpu import {name}")


def test_submodules_of_packages_that_were_modules_are_found() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from megatron_mimo.training.checkpoints import saving

    assert saving.__name__ == "megatron_mimo.training.checkpoints.saving"


def test_public_names_of_the_package_itself_warn_of_nothing() -> None:
    for name in NAMES_OF_0_1["megatron_mimo"]:
        _, heard = imported("megatron_mimo", name)
        assert not heard
    assert set(NAMES_OF_0_1["megatron_mimo"]) <= set(megatron_mimo.__all__)
