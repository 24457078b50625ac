"""Python imports this module at its start: PyTorch appears not to be installed, as for most users.

tensorboardX imports it where it can, which takes two seconds in each process that trains.
"""

import gc
import sys

sys.modules["torch"] = None  # type: ignore[assignment]

# Tracing makes many objects that stay: collect garbage less often, as the tests themselves do.
gc.set_threshold(20_000, 10, 10)
