"""The worker of `batch --ray`: a process with a model, which writes the answers to pieces."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from minigpt4_jax.cli.batch_answers import Answerer
from minigpt4_jax.cli.batch_output import BatchRow
from minigpt4_jax.cli.ray_batch.file_format import Format, Result
from minigpt4_jax.cli.ray_batch.plan import Parts, Piece, Stats
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.atomic import atomic_file, write_error, write_text_atomically


class Worker:
    """A class for `ray.data.Dataset.map_batches`, in whose batches a row names a piece."""

    def __init__(self, args: argparse.Namespace, source: Format, parts: Parts):
        self._args, self._source, self._parts = args, source, parts
        # An exception here would be taken for a lost worker, and the worker be started again and again.
        self._error = ""
        try:
            self._answerer = Answerer(args)
        except UserError as e:
            self._error = str(e)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer pieces, of which the batch has the fields as columns. Returns columns of statistics; a
        "failure" is why a piece cannot be answered or written, "" if it is."""
        columns = [batch[name].tolist() for name in Piece._fields]
        done = [self._answer(Piece(*fields)) for fields in zip(*columns, strict=True)]
        return {
            "number": batch["number"],
            "rows": [stats.rows for stats, _ in done],
            "errors": [stats.errors for stats, _ in done],
            "failure": [failure for _, failure in done],
        }

    def _answer(self, piece: Piece) -> tuple[Stats, str]:
        """-> (statistics of the written part, why it could not be written)."""
        try:
            if self._error:
                raise UserError(self._error)
            return self._write(piece), ""
        except UserError as e:
            return Stats(0, 0, 0.0), str(e)

    def _write(self, piece: Piece) -> Stats:
        begin = time.monotonic()
        try:
            rows, content = self._source.read(
                Path(piece.path), piece.start, piece.rows, piece.first, self._args.prompt
            )
        except OSError as e:
            raise UserError(f"--input={piece.path}: cannot be read ({e.strerror or e})") from None
        if len(rows) != piece.rows:
            raise UserError(f"--input={piece.path} has changed since the run began")
        results = self._kept_results(piece)
        for row, result in self._answerer.answer([r for r in rows if r.number not in results]):
            results[row.number] = result
        return self._save(piece, rows, [results[row.number] for row in rows], content, begin)

    def _kept_results(self, piece: Piece) -> dict[int, Result]:
        """Row -> result of a complete part whose rows with an error are answered again."""
        if not self._args.retry_errors or self._parts.stats(piece.number) is None:
            return {}
        results = self._parts.format.read_results(self._parts.path(piece.number))
        return {piece.first + n: r for n, r in enumerate(results) if "error" not in r}

    def _save(
        self, piece: Piece, rows: list[BatchRow], results: list[Result], content: Any, begin: float
    ) -> Stats:
        errors = sum("error" in result for result in results)
        stats = Stats(len(rows), errors, round(time.monotonic() - begin, 3))
        path = self._parts.path(piece.number)
        try:
            with atomic_file(path) as temporary:
                self._parts.format.write(temporary, rows, results, content)
            stats_text = json.dumps(stats._asdict()) + "\n"
            write_text_atomically(self._parts.stats_path(piece.number), stats_text)
        except OSError as e:
            raise write_error(path, e, "the same command continues from here") from None
        return stats
