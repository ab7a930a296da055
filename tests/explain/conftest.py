"""Fixtures of the tests of attribution."""

import pytest
from explain_cases import train

import medmamba


@pytest.fixture
def trained() -> medmamba.MedMamba:
    return train()
