"""Where tests find their files."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
TOKENIZER = FIXTURES / "llama_tokenizer"
SHARED = ROOT.parent / "shared"
REFERENCE = SHARED / "reference"


@cache
def process_folder() -> Path:
    """A folder for files that tests of this process share; it is deleted when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="minigpt4-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
