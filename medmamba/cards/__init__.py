"""Model cards: written from the files of a model folder, and checked against them."""

from .card import CARD_NAME, METRICS, NOTICE, card_data, default_repo, render_card, write_card
from .check import TOLERANCE, check_card
from .facts import (
    EXAMPLE_NAME,
    PICTURES,
    RESULTS_NAME,
    SHORTCUTS_NAME,
    TRANSFER_NAME,
    CardError,
    ModelFacts,
    read_facts,
)
from .licences import HUB_LICENCES, LicenceError, Terms, hub_licence, terms_of

__all__ = [
    "CARD_NAME",
    "EXAMPLE_NAME",
    "HUB_LICENCES",
    "METRICS",
    "NOTICE",
    "PICTURES",
    "RESULTS_NAME",
    "SHORTCUTS_NAME",
    "TOLERANCE",
    "TRANSFER_NAME",
    "CardError",
    "LicenceError",
    "ModelFacts",
    "Terms",
    "card_data",
    "check_card",
    "default_repo",
    "hub_licence",
    "read_facts",
    "render_card",
    "terms_of",
    "write_card",
]
