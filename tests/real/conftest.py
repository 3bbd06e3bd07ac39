"""What the tests on real data share."""

import pytest

from real.voc import Photographs, photographs


@pytest.fixture(scope="module")
def voc() -> Photographs:
    try:
        return photographs()
    except LookupError as error:
        pytest.skip(f"needs photographs with masks: {error}")
