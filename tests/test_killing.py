"""Whoever is killed (kill -9) at whatever moment: a run ends as if nothing had been, or with a reason.

`--kills=50` plays 50 seeds.
"""

from pathlib import Path

import pytest

from tests.killing import SILOS, check, play

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(200),
    pytest.mark.usefixtures("no_leaks"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--kills")))


@pytest.fixture(scope="module")
def undisturbed() -> list[str]:
    """The final weights of a run in which nobody is killed, once it is known."""
    return []


@pytest.mark.parametrize("quorum", [len(SILOS), len(SILOS) - 1], ids=["all", "not all"])
async def test_who_is_killed_comes_back_and_the_run_ends_well(
    seed: int, quorum: int, tmp_path: Path, undisturbed: list[str]
):
    if not undisturbed:
        (tmp_path / "undisturbed").mkdir()
        ending = await play(tmp_path / "undisturbed", None, quorum=len(SILOS), keeps=False)
        assert set(ending.silos.values()) == {ending.server}
        undisturbed.append(ending.server)
    ending = await play(tmp_path, seed, quorum=quorum, keeps=seed % 2 == 0)
    check(ending, tmp_path, quorum, undisturbed[0])
