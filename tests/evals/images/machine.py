"""What the machine must have for some of these tests."""

from __future__ import annotations

import pytest
from weightlab_evals.images.corruptions import corruptions

from weightlab.errors import UsageError

try:
    NAMES, _REASON = corruptions(), ""
except UsageError as error:  # OpenCV's wheel needs libGL, which a bare machine may lack
    NAMES, _REASON = [], error.message

with_corruptions = pytest.mark.skipif(bool(_REASON), reason=_REASON or "not skipped")
