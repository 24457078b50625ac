"""Python imports this module at its start: PyTorch appears not to be installed, as for most users.

tensorboardX imports it where it can, which takes two seconds in each process that trains.
"""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
