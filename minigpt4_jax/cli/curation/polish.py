"""minigpt4 curate polish --input=FILE --output=FILE --endpoint=URL: a language model corrects descriptions.

Rows that rules or filters remove go to OUTPUT.removed.jsonl with their cause; OUTPUT.report.json counts them.
Answers are kept in an SQLite file, so the same command continues an interrupted one, and one with other
filters asks nothing again.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minigpt4_jax.checkpoint.model_directory import fingerprint
from minigpt4_jax.cli import common
from minigpt4_jax.curation import endpoint, polish
from minigpt4_jax.curation.answers import Answer, AnswerCache, answer_key
from minigpt4_jax.curation.filters import FILTERS, FilterLimits
from minigpt4_jax.curation.local_polisher import BATCH_SIZE, LocalPolisher
from minigpt4_jax.curation.rows import (
    check_output,
    moved,
    read_rows,
    removed_path,
    report_path,
    write_rows,
    write_settings,
)
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.atomic import write_error, write_text_atomically

MILLION = 1_000_000
# options that one way of asking has
OPTIONS_OF = {
    "model": (
        "base", "dtype", "quantize", "kv_cache", "mesh", "template", "allow_nonfinite", "extra_bos", "seed",
        "batch_size",
    ),
    "endpoint": (
        "served_model", "concurrency", "retries", "timeout", "key_variable", "retry_errors"
    ),
}  # fmt: skip
# and options of both
ASKING = ("instruction", "temperature", "max_tokens", "price_in", "price_out", "cache")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.make_parser(
        "curate polish", "Correct descriptions with a language model, and remove bad ones.",
        model_required=False, exif=None,
    )  # fmt: skip
    p.add_argument("--input", required=True, type=Path, metavar="FILE", help="rows to polish")
    p.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="the rows that are kept"
    )
    who = p.add_argument_group("language model (one of --endpoint, --model, --rules-only)")
    who.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server")
    who.add_argument("--served-model", metavar="NAME", help="model of the server (its only one)")
    who.add_argument(
        "--rules-only", action="store_true", help="no language model, only the filters"
    )
    how = p.add_argument_group("asking")
    how.add_argument("--instruction", type=Path, metavar="FILE",
                     help="text file (--print-instruction shows the default)")  # fmt: skip
    how.add_argument("--print-instruction", action=_PrintInstruction, help="print it and exit")
    how.add_argument("--temperature", type=float, default=polish.TEMPERATURE,
                     help=f"of the replies ({polish.TEMPERATURE})")  # fmt: skip
    how.add_argument("--max-tokens", type=int, default=polish.MAX_TOKENS,
                     help=f"of a reply ({polish.MAX_TOKENS})")  # fmt: skip
    how.add_argument("--seed", type=int, default=0, help="of --model's sampling (0)")
    how.add_argument("--batch_size", type=int, default=BATCH_SIZE,
                     help=f"rows that --model decodes together ({BATCH_SIZE})")  # fmt: skip
    how.add_argument("--concurrency", type=int, default=8, help="requests at a time (8)")
    how.add_argument("--retries", type=int, default=endpoint.RETRIES,
                     help=f"of a request, with back-off ({endpoint.RETRIES})")  # fmt: skip
    how.add_argument("--timeout", type=float, default=endpoint.TIMEOUT, metavar="SECONDS",
                     help=f"for a reply ({endpoint.TIMEOUT:g})")  # fmt: skip
    how.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME",
                     help="environment variable with the API key (OPENAI_API_KEY)")  # fmt: skip
    how.add_argument("--price-in", type=float, metavar="PRICE", help="of a million input tokens")
    how.add_argument("--price-out", type=float, metavar="PRICE", help="of a million output tokens")
    how.add_argument("--cache", type=Path, metavar="FILE",
                     help="the answers (polish_answers.sqlite beside the output)")  # fmt: skip
    how.add_argument(
        "--retry-errors", action="store_true", help="ask again what the server refused"
    )
    rules = p.add_argument_group("filters")
    limits = FilterLimits()
    rules.add_argument("--no-filter", action="append", default=[], choices=tuple(FILTERS),
                       help="leave this filter out; may be repeated")  # fmt: skip
    rules.add_argument("--min-characters", type=int, default=limits.min_characters,
                       help=f"fewer are too short ({limits.min_characters})")  # fmt: skip
    rules.add_argument("--max-repetition", type=float, default=limits.max_repetition, metavar="SHARE",
                       help=f"of 4-grams that occurred before ({limits.max_repetition})")  # fmt: skip
    args = p.parse_args(argv)
    args.changed = {name for name, value in vars(args).items() if value != p.get_default(name)}
    return args


class _PrintInstruction(argparse.Action):
    """--print-instruction, like --help."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(polish.default_instruction(), end="")
        parser.exit()


def _check_used(args: argparse.Namespace) -> None:
    """UserError: an option that has no effect."""
    for owner, names in OPTIONS_OF.items():
        if getattr(args, owner) is None:
            for name in names:
                if name in args.changed:
                    raise UserError(f"{_flag(name)} is an option of --{owner}, which is not given")
    for name in ASKING if args.rules_only else ():
        if name in args.changed:
            raise UserError(f"{_flag(name)} has no effect with --rules-only, which asks nothing")


def _flag(name: str) -> str:
    special = {"extra_bos": "--no-extra-bos", "batch_size": "--batch_size"}
    return special.get(name, f"--{name.replace('_', '-')}")


def _check(args: argparse.Namespace) -> None:
    chosen = [args.endpoint is not None, args.model is not None, args.rules_only]
    if sum(chosen) != 1:
        raise UserError("expected one of --endpoint=URL, --model=DIR and --rules-only")
    if args.system is not None:
        raise UserError("--system: the instruction is the system message; pass --instruction=FILE")
    for name, least in (("concurrency", 1), ("retries", 0), ("max_tokens", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise UserError(f"{_flag(name)}={getattr(args, name)}: expected {least} or more")
    if not args.timeout > 0:
        raise UserError(f"--timeout={args.timeout:g}: expected seconds, more than 0")
    if not 0 <= args.temperature <= 2:
        raise UserError(f"--temperature={args.temperature:g}: expected 0 to 2")
    if (args.price_in is None) != (args.price_out is None):
        raise UserError("--price-in and --price-out belong together; give both")
    if args.input.resolve() == args.output.resolve():
        raise UserError("--input and --output are the same file; choose another --output")
    _check_used(args)


def read_instruction(path: Path | None) -> str:
    """UserError: it cannot be read, or is empty."""
    if path is None:
        return polish.default_instruction()
    text: str
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--instruction={path}: cannot be read as UTF-8 text ({e})") from None
    if not text.strip():
        raise UserError(
            f"--instruction={path}: is empty; expected what the language model is to do"
        )
    return text


# --- asking ---------------------------------------------------------------------------------------


class _Progress:
    """A bar with the tokens and the cost so far."""

    def __init__(self, total: int, known: Sequence[Answer], args: argparse.Namespace):
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(total=total, initial=len(known), unit="text", mininterval=interval)
        self._prices = (args.price_in, args.price_out)
        self.asked, self.tokens_in, self.tokens_out = 0, 0, 0
        self._earlier = [
            sum(a.prompt_tokens for a in known),
            sum(a.completion_tokens for a in known),
        ]

    def add(self, answer: Answer) -> None:
        self.asked += 1
        self.tokens_in += answer.prompt_tokens
        self.tokens_out += answer.completion_tokens
        self._bar.set_postfix_str(self.spent(), refresh=False)
        self._bar.update()

    def spent(self) -> str:
        """Tokens, and their price, of this run."""
        text = f"{self.tokens_in:,} + {self.tokens_out:,} tokens"
        cost = self.cost(self.tokens_in, self.tokens_out)
        return text if cost is None else f"{text}, {cost:.4f} spent"

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        price_in, price_out = self._prices
        return (
            None if price_in is None else (tokens_in * price_in + tokens_out * price_out) / MILLION
        )

    def report(self) -> dict[str, Any]:
        """Of this run and of all that made the answers."""
        total_in, total_out = self.tokens_in + self._earlier[0], self.tokens_out + self._earlier[1]
        report: dict[str, Any] = {
            "asked": self.asked, "prompt_tokens": total_in, "completion_tokens": total_out
        }  # fmt: skip
        cost = self.cost(total_in, total_out)
        return report if cost is None else {**report, "cost": round(cost, 6)}

    def close(self) -> None:
        self._bar.close()


def ask(
    args: argparse.Namespace, texts: Sequence[str], instruction: str, cache: AnswerCache
) -> tuple[Callable[[str], Answer | None], dict[str, Any], list[str]]:
    """Ask about the texts that have no answer yet: (text -> its answer, what was used, what failed)."""
    if args.endpoint is not None:
        url = endpoint.base_url(args.endpoint)
        client = endpoint.make_client(url, args.key_variable, args.retries, args.timeout)
        name = args.served_model or endpoint.only_model(client, url, args.key_variable)
        config = endpoint.EndpointConfig(
            url, name, instruction, args.temperature, args.max_tokens, args.concurrency,
            args.retries, args.timeout, args.key_variable,
        )  # fmt: skip
        settings = config.settings()
    else:
        settings = {
            "model_fingerprint": fingerprint(args.model, args.base),
            "dtype": args.dtype, "quantize": args.quantize, "kv_cache": args.kv_cache,
            "template": args.template, "extra_bos": args.extra_bos,
            "instruction": instruction, "temperature": args.temperature, "max_tokens": args.max_tokens,
            "seed": args.seed,
        }  # fmt: skip
    keys = {text: answer_key(settings, text) for text in texts}
    if args.retry_errors:
        cache.forget_refusals(keys.values())
    answers = {key: cache.get(key) for key in keys.values()}
    missing = {key: text for text, key in keys.items() if answers[key] is None}
    progress = _Progress(len(keys), [a for a in answers.values() if a is not None], args)
    failures: list[str] = []
    try:
        if missing:
            polisher = (
                endpoint.EndpointPolisher(client, config, cache)
                if args.endpoint is not None
                else _local(args, instruction, cache)
            )
            failures = polisher.run(missing, progress.add)
    finally:
        progress.close()
    print(
        f"{progress.asked} texts asked, {len(keys) - len(missing)} answered before; {progress.spent()}"
    )
    used = {**settings, **progress.report()}
    if args.model is not None:
        used["model"] = args.model
    return (lambda text: cache.get(keys[text])), used, failures


def _local(args: argparse.Namespace, instruction: str, cache: AnswerCache) -> LocalPolisher:
    from minigpt4_jax.inference.generation_config import GenerationConfig
    from minigpt4_jax.processing import chat_templates

    model = common.load_model(args)
    template = chat_templates.chat_format(model.config, model.tokenizer, args.template)
    config = GenerationConfig(
        max_new_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed,
        stop=template.stop if args.template else (), extra_bos=args.extra_bos,
    )  # fmt: skip
    return LocalPolisher(model, template, instruction, config, cache, args.batch_size)


# --- the command ------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    _check(args)
    instruction = read_instruction(args.instruction)
    check_output(args.output, "polish", args.input)
    rows = read_rows(args.input)
    limits = FilterLimits(args.min_characters, max_repetition=args.max_repetition)
    without = frozenset(args.no_filter)
    texts = list(dict.fromkeys(row["caption"] for row in rows if row.get("caption", "").strip()))
    used: dict[str, Any] = {}
    failures: list[str] = []
    if args.rules_only:
        polished = polish.polish_rows(rows, None, limits, without)
    else:
        path = args.cache or args.output.parent / "polish_answers.sqlite"
        with AnswerCache(path) as cache:
            answer_of, used, failures = ask(args, texts, instruction, cache)
            polished = polish.polish_rows(rows, answer_of, limits, without)
    _write(args, polished, used, limits)
    _print(args, polished, len(rows))
    if failures:
        print(
            f"{len(failures)} texts have no answer (the last: {failures[-1]}); the same command asks "
            "them again"
        )
    return 1 if failures else 0


def _write(
    args: argparse.Namespace, polished: polish.Polished, used: dict[str, Any], limits: FilterLimits
) -> None:
    source, target = args.input.parent, args.output.parent
    report = {
        "kept": len(polished.kept), "unchanged": polished.unchanged,
        "removed": dict(polished.causes.most_common()),
    }  # fmt: skip
    settings = {
        **used, "rules_only": args.rules_only, "min_characters": limits.min_characters,
        "max_repetition": limits.max_repetition, "no_filter": args.no_filter, **report,
    }  # fmt: skip
    write_rows(removed_path(args.output), (moved(row, source, target) for row in polished.removed))
    try:
        write_text_atomically(report_path(args.output), json.dumps(report, indent=1) + "\n")
    except OSError as e:
        raise write_error(report_path(args.output), e) from None
    write_settings(args.output, "polish", settings, args.input)
    write_rows(args.output, (moved(row, source, target) for row in polished.kept))


def _print(args: argparse.Namespace, polished: polish.Polished, num_rows: int) -> None:
    print(
        f"{len(polished.kept)} of {num_rows} rows kept, {polished.unchanged} of them unchanged: {args.output}"
    )
    for cause, count in polished.causes.most_common():
        print(f"  {count:6,} removed: {cause}")
    if polished.removed:
        print(f"removed rows, with their causes: {removed_path(args.output)}")
