"""Programs that measure on the user's own machine; rivals come with a checkout."""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def rivals_of_checkout() -> bool:
    """Whether tests/rivals of the checkout that this package is part of can be imported now."""
    tests = CHECKOUT / "tests"
    if not (tests / "rivals").is_dir():
        return False
    if str(tests) not in sys.path:
        sys.path.append(str(tests))
    return True
