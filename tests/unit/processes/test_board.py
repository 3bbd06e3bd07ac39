"""What front ends read off the board."""

from __future__ import annotations

import multiprocessing
import random

from cdam_server.processes.board import MAX_DEVICES, FrontEndWrites, ImagePlaces, make_board


def test_where_an_image_was() -> None:
    board = make_board(multiprocessing.get_context("forkserver"))
    one, other = ImagePlaces(board), ImagePlaces(board)
    keys = [random.Random(number).getrandbits(64) for number in range(2000)]
    assert all(one.get(key) is None for key in keys)
    for number, key in enumerate(keys):
        one.put(key, number % MAX_DEVICES)
        assert other.get(key) == number % MAX_DEVICES
    known = sum(other.get(key) == number % MAX_DEVICES for number, key in enumerate(keys))
    assert known > 0.95 * len(keys)  # the others have been forgotten, none is mistaken
    assert all(other.get(key) in {None, number % MAX_DEVICES} for number, key in enumerate(keys))


def test_writes_of_others() -> None:
    board = make_board(multiprocessing.get_context("forkserver"))
    its = [FrontEndWrites(board, number, 3) for number in range(3)]
    its[0].wrote()
    its[0].wrote()
    its[2].wrote()
    assert [writes.writes() for writes in its] == [1, 3, 2]
