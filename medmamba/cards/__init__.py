"""Model cards: written from the files of a model folder, and checked against them."""

from .card import CARD_NAME, METRICS, NOTICE, card_data, default_repo, render_card, write_card
from .check import TOLERANCE, check_card
from .dense import DenseFacts, check_dense_card, is_dense, read_dense_facts, render_dense_card, write_dense_card
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
    "DenseFacts",
    "LicenceError",
    "ModelFacts",
    "Terms",
    "card_data",
    "check_card",
    "check_dense_card",
    "default_repo",
    "hub_licence",
    "is_dense",
    "read_dense_facts",
    "read_facts",
    "render_card",
    "render_dense_card",
    "terms_of",
    "write_card",
    "write_dense_card",
]
