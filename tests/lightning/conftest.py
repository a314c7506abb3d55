"""Fits of tests are shorter than the steps in which rows that stand alone all count."""

import pytest

from saflex_lightning.evidence import evidence


@pytest.fixture(autouse=True)
def _short_warm_up(monkeypatch):
    monkeypatch.setattr(evidence, "_WARM_UP_ALONE", 2)
