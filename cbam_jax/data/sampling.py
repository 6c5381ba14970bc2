"""Which images a training batch holds: P classes from a shuffled deck, K images of each likewise.

A pure function of the seed and the step: ``deal`` is the rule, ``class_balanced_indices`` a batch.
"""

import math
from collections.abc import Sequence

import numpy as np

# The second word of every random key, so that no two streams share numbers.
CLASS_DECK, IMAGE_DECK, AUGMENTATION = range(3)


def class_balanced_indices(
    images: Sequence[np.ndarray],
    *,
    seed: int,
    classes_per_batch: int,
    images_per_class: int,
    step: int,
) -> np.ndarray:
    """Rows of the ``step``-th P x K batch: a hand of P classes, and of each a hand of K images.

    Every deck of classes holds each class once, so a class dealt from deck v is visited for the
    v-th time (from 0), which is the turn of its own deck of images: a pure function of the step.

    Args:
        images: for each class, the rows of its images (:func:`images_by_class`).
        seed: of all shuffles.
        classes_per_batch: P, at most the number of classes.
        images_per_class: K.
        step: which batch, from 0.

    Returns:
        int64 [P K], the K rows of a class side by side.
    """
    slots = step * classes_per_batch + np.arange(classes_per_batch)
    visits = slots // len(images)
    classes = deal((seed, CLASS_DECK), size=len(images), hand=classes_per_batch, turn=step)
    rows = []
    for which, visit in zip(classes.tolist(), visits.tolist(), strict=True):
        key, size = (seed, IMAGE_DECK, which), len(images[which])
        rows.append(images[which][deal(key, size=size, hand=images_per_class, turn=visit)])
    return np.concatenate(rows)


def images_by_class(label: np.ndarray) -> list[np.ndarray]:
    """The rows of each class that has any, in the order of the labels.

    Example:
        >>> [rows.tolist() for rows in images_by_class(np.array([5, 2, 5, 2, 2]))]
        [[1, 3, 4], [0, 2]]
    """
    order = np.argsort(label, kind="stable")
    _, starts = np.unique(label[order], return_index=True)
    return np.split(order, starts[1:])


def deal(key: Sequence[int], *, size: int, hand: int, turn: int) -> np.ndarray:
    """The ``turn``-th hand out of an endless pile of shuffled decks of ``size`` cards.

    Cards are dealt from the top. When a deck ends within a hand, the hand is filled from the next
    deck, passing over (not removing) the cards that it already holds. So no card is twice in a
    hand, and each deck is dealt to its end before the next: after any number of hands, two cards
    were dealt equally often, or one of them once more. A hand greater than the deck holds whole
    decks first, and the rest is dealt by that rule.

    It costs a few shuffles whatever the turn is; nothing before it is replayed.

    Args:
        key: non-negative integers; another key, another pile.
        size: cards in a deck.
        hand: cards in a hand.
        turn: which hand, from 0.

    Returns:
        int64 [hand], the cards, each in [0, size).

    Example:
        >>> hands = [deal((7,), size=5, hand=3, turn=turn) for turn in range(5)]
        >>> np.bincount(np.concatenate(hands)).tolist()
        [3, 3, 3, 3, 3]
    """
    whole_decks, hand = divmod(hand, size)
    deck, place = divmod(turn * hand, size)
    cards = _deck(key, size, hand, deck)[place : place + hand]
    if len(cards) < hand:
        cards = np.concatenate([cards, _deck(key, size, hand, deck + 1)[: hand - len(cards)]])
    return np.concatenate([np.tile(np.arange(size), whole_decks), cards])


def _deck(key: Sequence[int], size: int, hand: int, deck: int) -> np.ndarray:
    """The order of one deck: its shuffle, with the cards passed over by its first hand later."""
    if hand == 0:
        return np.arange(size)
    # Passing over reorders no more than the first `hand` cards. So in a deck of two hands or more
    # the last cards, all that the next deck depends on, are as shuffled. Smaller decks are
    # followed from the last one that began with a new hand: `hand` decks at most.
    start = deck - deck % (hand // math.gcd(hand, size))
    if size >= 2 * hand:
        start = max(start, deck - 1)
    order = _shuffle(key, size, start)
    for number in range(start + 1, deck + 1):
        held = number * size % hand
        shuffled = _shuffle(key, size, number)
        # Without held cards the hand is new and `first` is empty.
        first = np.flatnonzero(~np.isin(shuffled, order[size - held :]))[: -held % hand]
        order = np.concatenate([shuffled[first], np.delete(shuffled, first)])
    return order


def _shuffle(key: Sequence[int], size: int, deck: int) -> np.ndarray:
    return np.random.default_rng((*key, deck)).permutation(size)
