"""minigpt4 curate review --input=FILE: accept, edit or reject rows on a local web page, by keyboard.

Every decision is written to INPUT.decisions.jsonl at once; `curate export --decisions=FILE` applies them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt4_jax.curation.decisions import Decisions
from minigpt4_jax.curation.review_server import ReviewServer
from minigpt4_jax.curation.rows import decisions_path, read_rows
from minigpt4_jax.errors import Parser, UserError


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = Parser(
        prog="python -m minigpt4_jax.curate review",
        description="Accept, edit or reject rows on a local web page.",
    )
    p.add_argument("--input", required=True, type=Path, metavar="FILE", help="rows with captions")
    p.add_argument("--decisions", type=Path, metavar="FILE",
                   help="file to write (INPUT.decisions.jsonl)")  # fmt: skip
    p.add_argument("--port", type=int, default=8765, help="of 127.0.0.1; 0: a free one (8765)")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    rows = [row for row in read_rows(args.input) if row.get("caption", "").strip()]
    if not rows:
        raise UserError(f"--input={args.input}: has no row with a caption")
    path = args.decisions or decisions_path(args.input)
    if not path.parent.is_dir():
        raise UserError(f"--decisions={path}: there is no directory {path.parent}")
    decisions = Decisions(path)
    with ReviewServer(rows, args.input.parent, decisions, args.port, args.input.name) as server:
        print(f"{len(rows)} rows: open {server.url} in a browser; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            counts = decisions.counts(rows)
            names = ("accept", "edit", "reject", "open")
            print(f"\n{', '.join(f'{counts[name]} {name}' for name in names)}: {path}")
    return 0
