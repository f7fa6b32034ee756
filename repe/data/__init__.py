"""Contrast pairs and items: what concepts are read from, and what is measured on; by name, from files, audited.

Nothing here loads torch, transformers or scikit-learn until it is used.
"""

from repe.data.audit import Audit, audit
from repe.data.catalogue import Pairs, concept_of, concepts, find, find_task, has
from repe.data.concept import Concept, load_concept
from repe.data.items import Item, RequestPair, load_items, load_requests, load_texts
from repe.data.letters import turned
from repe.data.pairs import ContrastPair, split
from repe.data.worded import worded

__all__ = [
    "Audit",
    "Concept",
    "ContrastPair",
    "Item",
    "Pairs",
    "RequestPair",
    "audit",
    "concept_of",
    "concepts",
    "find",
    "find_task",
    "has",
    "load_concept",
    "load_items",
    "load_requests",
    "load_texts",
    "split",
    "turned",
    "worded",
]
