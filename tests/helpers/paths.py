"""Where tests find their files."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
TOKENIZER = FIXTURES / "llama_tokenizer"
SHARED = ROOT.parent / "shared"
REFERENCE = SHARED / "reference"
