"""Caches of libraries follow one folder, and what the user set for a library wins."""

from medmamba.cli.caches import FOLDER_OF, place_caches


def test_caches_lie_below_the_given_folder() -> None:
    environment = {"MEDMAMBA_CACHE_DIR": "/scratch/mm", "MPLCONFIGDIR": "/mine"}
    place_caches(environment)
    assert environment["TRITON_CACHE_DIR"] == "/scratch/mm/triton"
    assert environment["MPLCONFIGDIR"] == "/mine"
    assert set(FOLDER_OF) <= set(environment)


def test_nothing_changes_without_the_variable() -> None:
    environment: dict[str, str] = {}
    place_caches(environment)
    assert environment == {}
