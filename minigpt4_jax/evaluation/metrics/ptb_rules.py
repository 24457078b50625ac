"""The token patterns of Stanford's PTBTokenizer 3.4.1, as caption metrics use it (options -preserveLines
-lowerCase). The longest pattern wins, context included; of equally long ones the first."""

from typing import NamedTuple

import regex

SPACE = r"[ \t\u00A0\u2000-\u200A\u3000]"
NEWLINE = r"[\r\n\u2028\u2029\u000B\u000C\u0085]"
SPACENL = rf"(?:{SPACE}|{NEWLINE})"
NOT_SPACENL = r"[^ \t\u00A0\u2000-\u200A\u3000\r\n\u2028\u2029\u000B\u000C\u0085]"
_ALNUM = r"[\p{L}\p{Nd}]"

_LETTER = (
    r"(?:[\p{L}\u00AD\u0237-\u024F\u02C2-\u02C5\u02D2-\u02DF\u02E5-\u02FF\u0300-\u036F\u0370-\u037D\u0384"
    r"\u0385\u03CF\u03F6\u03FC-\u03FF\u0483-\u0487\u04CF\u04F6-\u04FF\u0510-\u0525\u055A-\u055F\u0591-\u05BD"
    r"\u05BF\u05C1\u05C2\u05C4\u05C5\u05C7\u0615-\u061A\u063B-\u063F\u064B-\u065E\u0670\u06D6-\u06EF\u06FA-"
    r"\u06FF\u070F\u0711\u0730-\u074F\u0750-\u077F\u07A6-\u07B1\u07CA-\u07F5\u07FA\u0900-\u0903\u093C\u093E-"
    r"\u094E\u0951-\u0955\u0962-\u0963\u0981-\u0983\u09BC-\u09C4\u09C7\u09C8\u09CB-\u09CD\u09D7\u09E2\u09E3"
    r"\u0A01-\u0A03\u0A3C\u0A3E-\u0A4F\u0A81-\u0A83\u0ABC-\u0ACF\u0B82\u0BBE-\u0BC2\u0BC6-\u0BC8\u0BCA-\u0BCD"
    r"\u0C01-\u0C03\u0C3E-\u0C56\u0D3E-\u0D44\u0D46-\u0D48\u0E30-\u0E3A\u0E47-\u0E4E\u0EB1-\u0EBC\u0EC8-"
    r"\u0ECD]|&[aeiouAEIOU](?i:acute|grave|uml);)"
)
_DIGIT = r"[\p{Nd}\u07C0-\u07C9]"
_SGML = (
    r"<(?:[!?][A-Za-z\-][^>\r\n]*|[A-Za-z][A-Za-z0-9_:.\-]*"
    r"(?: +(?:[A-Za-z][A-Za-z0-9_:.\-]*|[A-Za-z][A-Za-z0-9_:.\-]* *= *"
    r"(?:'[^'\r\n]*'|\"[^\"\r\n]*\"|[A-Za-z][A-Za-z0-9_:.\-]*)))* */?|/[A-Za-z][A-Za-z0-9_:.\-]*) *>"
)
_NUM = rf"(?:{_DIGIT}+|{_DIGIT}*(?:[.:,\u00AD\u066B\u066C]{_DIGIT}+)+)"
_NUMBER = rf"[\-+]?{_NUM}"
_WORD = rf"{_LETTER}(?:{_LETTER}|{_DIGIT})*(?:[.!?]{_LETTER}(?:{_LETTER}|{_DIGIT})*)*"
_APOS = r"(?:['\u0092\u2019]|&(?i:apos);)"
_APOS_ETC = rf"(?:{_APOS}|[`\u0091\u2018\u201B])"
_REDAUX = rf"{_APOS}(?:[msdMSD]|(?i:re|ve|ll))"
_SWORD = r"[A-Za-z\u00AD]*[A-MO-Za-mo-z]\u00AD*"
_SREDAUX = rf"(?i:n){_APOS_ETC}(?i:t)"
_COUNTRY_ACRO = (
    r"(?i:Canada|Sino|Korean|EU|Japan|non)-(?i:U\.S)"
    r"|(?i:U\.S\.-)(?i:U\.K|U\.S\.S\.R)"
)
_ACRO = rf"(?:[A-Za-z](?:\.[A-Za-z])*|{_COUNTRY_ACRO})"
_ACRO2 = rf"(?:[A-Za-z](?:\.[A-Za-z])+|{_COUNTRY_ACRO})"
_HTHING = rf"[A-Za-z0-9][A-Za-z0-9.,\u00AD]*(?:-(?:[A-Za-z0-9\u00AD]+|{_ACRO2}\.))+"
_THING = (
    rf"(?:[dDoOlL]{_APOS_ETC}{_ALNUM})?{_ALNUM}+"
    rf"(?:[-_\u058A\u2010\u2011](?:[dDoOlL]{_APOS_ETC}{_ALNUM})?{_ALNUM}+)*"
)
_THINGA = r"[A-Z]+(?:(?:[+&]|&(?i:amp);)[A-Z]+)+"
_THING3 = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
_APOWORD = (
    rf"(?:{_APOS}(?i:n){_APOS}?|[lLdDjJ]{_APOS}|(?i:Dunkin){_APOS}|(?i:somethin){_APOS}|(?i:ol){_APOS}"
    rf"|{_APOS}(?i:em)|[A-HJ-XZn]{_APOS_ETC}\p{{L}}{{2}}\p{{L}}*|{_APOS}[2-9]0(?i:s)|{_APOS}(?i:till?)"
    rf"|\p{{L}}\p{{L}}*[aeiouyAEIOUY]{_APOS_ETC}[aeiouA-Z]\p{{L}}*|{_APOS}(?i:cause)|(?i:cont'd)\.?|(?i:'twixt)"
    r"|(?i:nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)"
    rf"|(?i:O){_APOS_ETC}(?i:o))"
)
_FULLURL = (
    r"(?i:ftp|svn|svn\+ssh|http|https|mailto)://[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|.!?(){},-]"
)
# [wW]{3}: with (?i:www) the package `regex` no longer tries the second alternative everywhere
_LIKELYURL = (
    r"(?:(?:[wW]{3}\.(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4})"
    r"|(?:(?:[^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+(?i:com|net|org|edu)))"  # ",-_" is a range there too
    r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-])?"
)
_EMAIL = (
    r"(?:&(?i:lt);|<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00A0{}]*@(?:[^ \t\n\f\r\"<>|(){}.\u00A0]+\.)*"
    r"[^ \t\n\f\r\"<>|(){}.\u00A0]+(?:&(?i:gt);|>)?"
)
_TWITTER = rf"[@\uFF20][a-zA-Z_][a-zA-Z_0-9]*|[#\uFF03]{_LETTER}+"
_DATE = rf"{_DIGIT}{{1,2}}[\-/]{_DIGIT}{{1,2}}[\-/]{_DIGIT}{{2,4}}"
_SUPERSCRIPT = (
    r"[\u207A\u207B\u208A\u208B]?(?:[\u2070\u00B9\u00B2\u00B3\u2074-\u2079]+|[\u2080-\u2089]+)"
)
_FRAC = rf"(?:{_DIGIT}{{1,4}}[- \u00A0])?{_DIGIT}{{1,4}}(?:\\?/|\u2044){_DIGIT}{{1,4}}"
_ABBREV1 = (
    r"(?:(?i:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|Mon|Tue|Tues|Wed|Thu|Thurs|Fri)"
    r"|(?i:Ala|Ariz|Calif|Colo|Conn|Ct|Dak|Fla|Ga|Ind|Kans?|Ky|Md|Mich|Minn|Mo|Mont|Neb|Nev|Okla|Penn"
    r"|Tenn|Va|Vt|Wisc?|Wyo)"
    r"|A(?i:z)|A(?i:rk)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass)|M(?i:iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)"
    r"|(?i:Inc|Cos?|Corp|Pp?t[ye]s?|Ltd|Plc|Rt|Bancorp|Dept|Bhd|Assn|Univ|Intl|Sys|tel|est|ext|sq)"
    r"|(?i:Jr|Sr|Bros|(?:Ed|Ph)\.D|Blvd|Rd|Esq|etc|al|seq))\."
)
_ABBREV2_WORDS = (
    r"(?:(?i:Mr|Mrs|Ms|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt"
    r"|Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme"
    r"|Msgr|Sfc|Invt|Elec|Natl|M[ft]g|vs|Alex|Wm|Jos|Cie|a\.k\.a|cf|TREAS|Ph)"
    rf"|M(?i:iss)|[v]|{_ACRO})"
)
_ABBREV2 = rf"{_ABBREV2_WORDS}\."
_ABBREV3 = r"(?i:ca|figs?|prop|nos?|art|bldg|prop|pp|op)\."
_SENTENCE_STARTERS = (
    "A|About|According|Additionally|After|All|Also|Although|An|Another|As|At|Before|Both|But|By|Did|During|"
    "Each|Earlier|Following|For|From|He|Her|Here|His|How|However|If|In|It|Its|Last|Later|Many|More|Most|Mr\\.|"
    "Mrs\\.|Ms\\.|Now|On|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|"
    "This|Two|Under|Upon|We|When|While|What|Who|Why|Yet|You"
)
_PHONE = (
    r"(?:\([0-9]{2,3}\)[ \u00A0]?|(?:\+\+?)?(?:[0-9]{2,4}[\- \u00A0])?[0-9]{2,4}[\- \u00A0])"
    r"[0-9]{3,4}[\- \u00A0]?[0-9]{3,5}|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"
)
_SPECIAL = (
    r"-(?i:RRB|LRB|RCB|LCB|RSB|LSB)-|(?i:C\.D\.s)|(?i:pro-|anti-)|(?i:S(?:&|&amp;)P-500|S(?:&|&amp;)Ls)"
    rf"|(?i:Cap){_APOS}(?i:n)|(?i:c){_APOS}(?i:est)"
)
_CURRENCY = (
    r"[\u00A2-\u00A5\u0080\u20A0\u20A4\u20AA\u20AC\u20B9\u060B\u0E3F\uFFE0\uFFE1\uFFE5\uFFE6]"
)
_INSENTP = r"[,;:\u3001]"
_QUOTES = (
    rf"(?:{_APOS}|''|[`\u2018-\u201F\u0082\u0084\u0091-\u0094\u2039\u203A\u00AB\u00BB]{{1,2}})"
)
_DBLQUOT = r"(?:\"|&(?i:quot);)"
_SMILEY = r"[<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]]"
_ASIAN_SMILEY = (
    r"[\^x=~<>]\.\[\^x=~<>]|[\-\^x=~<>']_[\-\^x=~<>']|\([\-\^x=~<>'][_.]?[\-\^x=~<>']\)"
    r"|\([\^x=~<>']-[\^x=~<>'`]\)"
)
_MISC_SYMBOL = (
    r"[+%&~\^|\\\u00A6\u00A7\u00A8\u00A9\u00AC\u00AE\u00AF\u00B0-\u00B3\u00B4-\u00BA\u00D7\u00F7\u0387\u05BE\u05C0\u05C3\u05C6\u05F3\u05F4"
    r"\u0600-\u0603\u0606-\u060A\u060C\u0614\u061B\u061E\u066A\u066D\u0703-\u070D\u07F6\u07F7\u07F8\u0964"
    r"\u0965\u0E4F\u1FBD\u2016\u2017\u2020-\u2023\u2030-\u2038\u203B\u203E-\u2042\u2044\u207A-\u207F\u208A-"
    r"\u208E\u2100-\u214F\u2190-\u21FF\u2200-\u2BFF\u3012\u30FB\uFF01-\uFF0F\uFF1A-\uFF20\uFF3B-\uFF40\uFF5B-"
    r"\uFF65\uFF65]"
)


class TokenRule(NamedTuple):
    """token, and the context that must follow it. name: of the action; "" keeps the token."""

    name: str
    token: str
    context: str = ""


RULES = (
    TokenRule("", r"(?i:c\+\+|c#|f#)"),
    TokenRule("push3", r"(?i:cannot|'twas)"),
    TokenRule("push2", rf"(?:{_APOS}(?i:tis)|(?i:gonna|gotta|lemme|gimme|wanna))"),
    TokenRule("nbsp", _SGML),
    TokenRule("dash", r"(?:&(?i:MD|mdash|ndash);|[\u0096\u0097\u2013\u2014\u2015])"),
    TokenRule("amp", r"&(?i:amp);"),
    TokenRule("", r"&(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);"),
    TokenRule("word", _WORD, _REDAUX),
    TokenRule("word", _SWORD, _SREDAUX),
    TokenRule("word", _WORD),
    TokenRule("", _APOWORD),
    TokenRule("", rf"(?i:y){_APOS}", r"\p{L}"),
    TokenRule("", _FULLURL),
    TokenRule("", _LIKELYURL, r"[^A-Za-z]"),
    TokenRule("", _EMAIL),
    TokenRule("", _TWITTER),
    TokenRule("quote", _REDAUX, r"[^A-Za-z]"),
    TokenRule("quote", _SREDAUX, r"[^A-Za-z]"),
    TokenRule("", _DATE),
    TokenRule("number", _NUMBER),
    TokenRule("", _SUPERSCRIPT),
    TokenRule("nbsp", _FRAC),
    TokenRule("fraction", r"[\u00BC\u00BD\u00BE\u2153-\u215E]"),
    TokenRule("amp", _SPECIAL),
    TokenRule("", _THING3),
    TokenRule("", r"[A-Z]*\$|#"),
    TokenRule("currency", _CURRENCY),
    TokenRule("acronym", _ABBREV2, rf"{SPACE}+(?:{_SENTENCE_STARTERS}|{_SGML})(?:{SPACE}|[?!])"),
    TokenRule("", _ABBREV3, rf"{SPACENL}?\p{{Nd}}"),
    TokenRule("duplicate", _ABBREV1, rf"{SPACE}(?:{SPACE}|\p{{Lu}}|{_SGML})"),
    TokenRule("", _ABBREV1, r"(?s:..)"),
    TokenRule("duplicate", _ABBREV1),
    TokenRule("", _ABBREV2),
    TokenRule("", _ABBREV2_WORDS, SPACENL),
    TokenRule("", rf"{_APOS}[0-9][0-9]", SPACENL),
    TokenRule("word", rf"{_WORD}\.", _INSENTP),
    TokenRule("phone", _PHONE),
    TokenRule("quote", _DBLQUOT, r"[A-Za-z0-9$]"),
    TokenRule("quote", _DBLQUOT),
    TokenRule("parens", _SMILEY, r"[^A-Za-z0-9]"),
    TokenRule("parens", _ASIAN_SMILEY),
    TokenRule("less", r"<|&(?i:lt);"),
    TokenRule("greater", r">|&(?i:gt);"),
    TokenRule("bracket", r"[{}()\[\]]"),
    TokenRule("hyphens", r"-+"),
    TokenRule("ellipsis", r"\.\.\.+|[\u0085\u2026]", rf"\.{SPACE}+\p{{L}}"),
    TokenRule("ellipsis", r"\.\.\.+|[\u0085\u2026]|\.[ \u00A0](?:\.[ \u00A0])+\."),
    TokenRule("", r"@+|#+|_+"),
    TokenRule("", r"\*+|(?:\\\*){1,3}"),
    TokenRule("", _INSENTP),
    TokenRule("", r"[?!]+"),
    TokenRule("", r"[.\u00A1\u00BF\u037E\u0589\u061F\u06D4\u0700-\u0702\u07FA\u3002]"),
    TokenRule("", r"="),
    TokenRule("", r"/"),
    TokenRule("word", _HTHING),
    TokenRule("word", rf"{_HTHING}\.", _INSENTP),
    TokenRule("", rf"(?:{_THING})\.", _INSENTP),
    TokenRule("", _THING),
    TokenRule("amp", rf"{_THINGA}\.", _INSENTP),
    TokenRule("amp", _THINGA),
    TokenRule("quote", "'", r"''"),
    TokenRule("quote", "'", rf"[A-Za-z]{NOT_SPACENL}"),
    TokenRule("quote", _QUOTES),
    TokenRule("quote", _REDAUX),
    TokenRule("quote", _SREDAUX),
    TokenRule("", r"<<|>>"),
    TokenRule("", _MISC_SYMBOL),
    TokenRule("skip", rf"{SPACE}+|&(?i:nbsp);|[\u200B\u200E-\u200F\uFEFF]"),
)  # fmt: skip


class Compiled(NamedTuple):
    """A rule with its patterns; whole is token and context."""

    name: str
    token: "regex.Pattern[str]"
    context: "regex.Pattern[str] | None"
    whole: "regex.Pattern[str]"


def compile_rules() -> list[Compiled]:
    def pattern(text: str) -> "regex.Pattern[str]":
        return regex.compile(text, regex.POSIX | regex.V0)

    return [
        Compiled(
            r.name, pattern(r.token), pattern(r.context) if r.context else None,
            pattern(f"(?:{r.token})(?:{r.context})" if r.context else r.token),
        )
        for r in RULES
    ]  # fmt: skip
