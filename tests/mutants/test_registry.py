"""The registry is in order: what a change of `optimized/` breaks in it is named at once."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import optimized
from mutants.mutant import Mutant
from mutants.profiles import PROFILES, PROFILES_ON_GPU, Profile
from mutants.registry import MUTANTS
from tests.faults.taxonomy import CLASSES

ROOT = Path(optimized.__file__).parent.parent


@pytest.mark.parametrize("file", sorted({m.file for m in MUTANTS}))
def test_mutants_fit_their_file(file: str) -> None:
    """The old text of each stands once in the file (else an error names it), and the new one is another program."""
    text = (ROOT / file).read_text()
    original = ast.dump(ast.parse(text))
    for mutant in MUTANTS:
        if mutant.file == file:
            assert ast.dump(ast.parse(mutant.mutated(text))) != original, mutant.name


def test_names_are_unique() -> None:
    assert not [name for name, count in Counter(m.name for m in MUTANTS).items() if count > 1]
    changes = Counter((m.file, m.old, m.new) for m in MUTANTS)
    assert max(changes.values()) == 1


def test_every_class_has_a_mutant() -> None:
    assert {m.bug for m in MUTANTS} == set(CLASSES)


def test_what_is_equivalent_is_argued() -> None:
    assert all(len(m.equivalent.split()) >= 5 for m in MUTANTS if m.equivalent)
    assert {m.device for m in MUTANTS} == {"cpu", "cuda"}


@pytest.mark.parametrize(("device", "profiles"), [("cpu", PROFILES), ("cuda", PROFILES_ON_GPU)])
def test_every_mutant_has_a_profile(device: str, profiles: dict[str, Profile]) -> None:
    """Of tests that are there; and no profile is left without a mutant."""
    assert set(profiles) == {m.file for m in MUTANTS if m.device == device}
    for profile in profiles.values():
        assert all((ROOT / "tests" / file).is_file() for file in profile.files)


def test_an_anchor_that_does_not_fit_is_named() -> None:
    mutant = Mutant("lost", "optimized/file.py", "a = 1\n", "a = 2\n", "mass")
    for text in ("b = 1\n", "a = 1\na = 1\n"):
        with pytest.raises(ValueError, match="lost: expected its old text once"):
            mutant.mutated(text)
