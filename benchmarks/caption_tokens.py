"""Caption tokens of this package beside those of Stanford's PTBTokenizer, which pycocoevalcap runs in Java.

    python benchmarks/caption_tokens.py [--lines=20000] [--seed=0] [--shown=10]

Lines are random sequences of words and of what tokenizers trip over: contractions, abbreviations, numbers,
fractions, prices, URLs, email addresses, smileys, entities, brackets, quotes, also glued together. Prints how
many lines differ, and some of them. Needs Java and pip install '.[captions]'.
"""

import random
import re

from common import argument_parser
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from minigpt4_jax.errors import run
from minigpt4_jax.evaluation.metrics.ptb_tokenizer import tokenize

WORDS = "a the two cat dogs kite walrus Bucket LANTERN spoon's blue-green x-ray and/or café naïve"
ODD = """it's they'll we've I'm y'all 'tis 'n' rock'n'roll o'clock O'Neil don't cannot gonna lemme
wanna '90s e.g. Mr. Mrs. No. No.5 U.S. U.S.A. Dec. Jan. Mar.5 Inc. p.m. etc. vs. St. op. Ph.D. 1 20
3,000 1,000.5 1.5 .5 -5 +7 10% 3:30 1/2 2½ ¼ 12-31-99 555-1212 (415) +1-800-555-1212 $5.00 US$5 £3
€7 ¢ #3 #tag @name a.b@c.de <a@b.org> www.ab.org www.Ab.com ex.com Ex.COM/a/b. http://a.b/c?d=1
5x.net x1.y2.edu :) ;-) =D <3 ... .. -- --- ---- — – … “ ” ‘ ’ " '' `` ` ( ) [ ] { } <b> </b> <br/>
& &amp; &lt; &gt; AT&T R&amp;D C++ C# * ** ^ ~ _ __ | \\ / = ! ?! ?? ; : , . 。 ª º × ÷ ° © ™ 😀
\u00ad \u200b \uff21"""  # noqa: RUF001
GLUE = "-.'/,:;!?&%$#@*()[]{}<>|~^=+"


def line(rng: random.Random) -> str:
    words, odd = WORDS.split(), ODD.split()
    parts = [rng.choice(odd if rng.random() < 0.6 else words) for _ in range(rng.randrange(1, 9))]
    text = " ".join(re.sub(r"\d", lambda _: str(rng.randrange(10)), part) for part in parts)
    if rng.random() < 0.3:  # two of them without a space, or with a mark between them
        text = text.replace(" ", rng.choice(["", rng.choice(GLUE)]), 1)
    return text.upper() if rng.random() < 0.05 else text


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shown", type=int, default=10, help="lines that differ, to print")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    lines = [line(rng) for _ in range(args.lines)]
    java = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(lines)})
    ours = tokenize(lines)
    differ = [i for i, tokens in enumerate(ours) if java[i][0] != tokens]
    print(f"{len(differ)} of {len(lines)} lines differ")
    for i in differ[: args.shown]:
        print(f"  {lines[i]!r}\n    Java {java[i][0]!r}\n    ours {ours[i]!r}")


if __name__ == "__main__":
    run(main)
