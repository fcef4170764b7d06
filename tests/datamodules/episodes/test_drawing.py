"""Which images an episode has: every ordered choice equally likely, the same alone and in a batch."""

import collections
import math

import numpy as np
import pytest

from datamodules.episodes import drawing
from datamodules.episodes.counter import key_of, keys_of
from datamodules.episodes.drawing import TaskShape, draw_images


def draw(episodes, sizes, ways, each, key=0):
    sizes = np.array(sizes)
    starts = np.cumsum(sizes) - sizes
    return draw_images(keys_of(key_of(key), np.arange(episodes)), starts, sizes, ways, each)


def test_every_ordered_choice_is_equally_likely():
    # Three classes with 2, 3 and 4 images: ordered pairs of classes, of each an ordered pair of images.
    numbers = draw(60000, [2, 3, 4], ways=2, each=2)
    starts = {0: (0, 2), 1: (2, 3), 2: (5, 4)}
    counts = collections.Counter(tuple(task.ravel().tolist()) for task in numbers)
    statistic = outcomes = 0
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            pairs = [
                [(a, b) for a in range(s, s + n) for b in range(s, s + n) if a != b]
                for s, n in (starts[first], starts[second])
            ]
            expected = 60000 / 6 / len(pairs[0]) / len(pairs[1])
            for choice in [(*p, *q) for p in pairs[0] for q in pairs[1]]:
                statistic += (counts.pop(choice, 0) - expected) ** 2 / expected
                outcomes += 1
    assert not counts, "a choice that must not be"
    assert outcomes == 2 * (2 * 6 + 2 * 12 + 6 * 12)
    # Chi-square: its mean is `freedom`, its deviation sqrt(2 freedom).
    freedom = outcomes - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_a_batch_is_its_episodes_and_the_first_numbers_do_not_depend_on_how_many_follow():
    sizes, keys = [20, 30, 25, 40], keys_of(key_of(5), np.arange(8))
    starts = np.cumsum(sizes) - np.array(sizes)
    together = draw_images(keys, starts, np.array(sizes), 3, 16)
    for k in range(8):
        assert np.array_equal(draw_images(keys[k : k + 1], starts, np.array(sizes), 3, 16)[0], together[k])
    assert np.array_equal(draw_images(keys, starts, np.array(sizes), 3, 4), together[:, :, :4])


def test_all_images_of_a_class_can_be_asked_for():
    numbers = draw(50, [6, 6, 6], ways=3, each=6)
    assert (np.sort(numbers.reshape(50, -1)) == np.arange(18)).all()
    assert len({tuple(task.ravel()) for task in numbers}) == 50


def test_going_on_along_a_sequence_gives_the_same_numbers(monkeypatch):
    expected = draw(30, [20, 50, 21], ways=3, each=18)
    monkeypatch.setattr(drawing, "likely_enough", lambda size, count: count)
    assert np.array_equal(draw(30, [20, 50, 21], ways=3, each=18), expected)


@pytest.mark.parametrize(("size", "count"), [(600, 20), (20, 16), (5, 5), (1300, 16)])
def test_enough_numbers_are_drawn_at_once_mostly(size, count):
    # Coupon collecting: the expected number of draws until `count` of `size` are seen.
    expected = sum(size / (size - k) for k in range(count))
    assert expected < drawing.likely_enough(size, count) < 2 * expected + 10


def test_support_and_query_are_divided_by_each_class_own_shots():
    shape = TaskShape((1, 3, 2), queries=2)
    numbers = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    support, query = shape.divide(numbers)
    assert support[0].tolist() == [0, 5, 6, 7, 10, 11]
    assert query[0].tolist() == [3, 4, 8, 9, 13, 14]
    assert support[1].tolist() == [15, 20, 21, 22, 25, 26]
    assert [labels.tolist() for labels in shape.labels] == [[0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]]
