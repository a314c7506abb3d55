"""What a step costs, in counts: kernels beside the plain step's, and looks that wait for a device.

Batches of 128 rows, in the Trainer; each fourth step scores a quarter as many validation rows.
"""

import pytest
from helpers import golden
from helpers.counting import FIRST, LAST, as_on_an_accelerator, count, saflex
from helpers.training import assert_same_state

INTERVAL = 4


@pytest.fixture(scope="module")
def plain():
    return count()


@pytest.mark.parametrize(("settings", "most"), [({}, 83), ({"preset": "gradient"}, 85)], ids=str)
def test_kernels_beside_those_of_the_plain_step(plain, settings, most):
    with as_on_an_accelerator():
        counted = count(saflex(**settings))
    assert counted.mean() - plain.mean() <= most


@pytest.mark.parametrize("settings", [{}, {"preset": "gradient"}], ids=str)
def test_no_step_waits_for_the_device_but_those_that_look_at_validation_rows(settings):
    with as_on_an_accelerator():
        counted = count(saflex(**settings))
    looks = {step: set(seen) for step, seen in counted.looks.items()}
    assert len(looks) == LAST - FIRST
    due = [step for step in looks if step % INTERVAL == 0]
    between = set().union(*(looks[step] for step in looks if step not in due))
    assert between == set()
    if not settings:  # the ways in which a look is allowed, so that the count can see one
        assert set().union(*(looks[step] for step in due)) == {
            "averages._with_waiting",
            "averages._with_room",
            "evidence._take_in",
            "evidence.remember",
            "stream._row",  # on the host
        }


def test_what_waits_is_learned_as_if_it_were_looked_at_in_every_step(monkeypatch):
    """Where each step looks at validation rows, nothing has waited when the next one begins."""
    monkeypatch.setitem(golden.CASES, "every step", {"refresh_every_n_steps": 1})
    expected = golden.run("every step")
    with as_on_an_accelerator():
        found = golden.run("every step")
        later = golden.run("robust")
    assert_same_state(found, expected)
    assert any(not value.equal(later[name]) for name, value in golden.run("robust").items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_what_waits_is_in_checkpoints(tmp_path):
    with as_on_an_accelerator():
        whole = golden.run("robust")
        golden.run("robust", folder=tmp_path, steps=golden.STOP)
        assert_same_state(golden.run("robust", folder=tmp_path, resume=True), whole)
