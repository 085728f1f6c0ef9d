"""Numbers that are written out in a Typst source, where all measured ones have to come from tables.

The source is read as readers get it: words without code, raw text and labels. Of formulas and code only decimals count,
and of code only those that nothing is compared or computed with.
"""

import re

NAME = re.compile(r"[A-Za-z_][\w-]*")
STATEMENT = re.compile(r"#(let|set|show|import|include)\b")
FIELD = re.compile(r"\.(?=[a-z])")
BRANCH = re.compile(r"#(if|for|while)\b")
FURTHER = re.compile(r"\s*else(\s+if)?\b")
SKIPPED = re.compile(r"//[^\n]*|/\*.*?\*/|```.*?```|`[^`]*`|@[\w:.-]*\w|<[A-Za-z][\w:.-]*>|\\.", re.DOTALL)
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
CLOSING = {"(": ")", "{": "}", "[": "]"}
NUMBER = re.compile(r"(?<![\w.])\d[\d.,]*(?<![.,])(?:e-?\d+)?")
DECIMAL = re.compile(r"(?<![<>*+-] )(?<![<>]= )(?<!-)(?<![\w.])(?:\d+\.\d+(?:e-?\d+)?|\d+e-?\d+)(?!\d|%|em|pt|mm)")
SETTINGS = (  # of the studies and of our runs, names and definitions: what no run measures
    *(
        r"Llama-2-7B",
        r"top-[15]",
        r"95 percent intervals?",
        r"(from )?ranks? \d+( to \d+|, \d+ and \d+)?",
        r"output of zero errs by 1",
    ),
    *(r"layers \d+(, \d+)? and \d+( of \d+)?", r"2048 of 32 000 tokens", r"0\.1 nats unless a table says otherwise"),
    *(
        r"at rate 0\.01, in 50 passes over 1024 prompts",
        r"at that width 0\.02",
        r"25 steps at a rate",
        r"on 20 prompts",
    ),
    *(r"15 000 steps of two prompts on 50", r"the same 20", r"expert ranks from 16 to 128"),
    *(r"0\.01\^2", r"#let exactly = 1e-6"),
)
DECLARED = re.compile("|".join(SETTINGS).replace(" ", r"\s+"))


class Scanner:
    """Reads a source once, collecting words, formulas and code with the place where each begins."""

    def __init__(self, source: str) -> None:
        self.source, self.at = source, 0
        self.words: list[tuple[int, str]] = []  # where they begin, and they
        self.formulas: list[tuple[int, str]] = []
        self.statements: list[tuple[int, str]] = []
        self.markup("")

    def take(self, pattern: re.Pattern[str]) -> bool:
        """Go past `pattern` where it comes next."""
        found = pattern.match(self.source, self.at)
        self.at = found.end() if found else self.at
        return found is not None

    def markup(self, closing: str) -> None:
        """Collect text up to `closing`, code and the like left out."""
        start = self.at
        while self.at < len(self.source) and self.source[self.at] != closing:
            here = self.at
            if self.source[here] == "#":
                self.keep(start, here)
                self.code_in_text()
            elif self.source[here] == "$":
                self.keep(start, here)
                self.at = self.source.index("$", here + 1) + 1
                self.formulas.append((here, self.source[here : self.at]))
            elif self.source[here] == "[":
                self.keep(start, here)
                self.at += 1
                self.markup("]")
            elif not self.source.startswith("//", here) or self.source[here - 1] != ":":
                if not self.take(SKIPPED):
                    self.at += 1
                    continue
                self.keep(start, here)
            else:
                self.at += 2
                continue
            start = self.at
        self.keep(start, self.at)
        self.at += 1

    def keep(self, start: int, end: int) -> None:
        """Collect a piece of text."""
        self.words.append((start, self.source[start:end]))

    def code_in_text(self) -> None:
        """Go past one `#...`, into the texts that it holds."""
        start = self.at
        if self.take(STATEMENT):
            self.code("\n")
        elif self.take(BRANCH):
            self.branch()
            while self.take(FURTHER):
                self.branch()
        else:
            self.at += 1
            self.take(NAME)
            while self.at < len(self.source) and (self.source[self.at] in CLOSING or self.take(FIELD)):
                if self.source[self.at] in CLOSING:
                    self.block()
                self.take(NAME)
        self.statements.append((start, STRING.sub(blank, self.source[start : self.at])))

    def branch(self) -> None:
        """Go past a condition and what hangs on it."""
        self.code("[{")
        self.block()

    def block(self) -> None:
        """Go past one pair of brackets."""
        opening = self.source[self.at]
        self.at += 1
        if opening == "[":
            self.markup("]")
        else:
            self.code(CLOSING[opening])
            self.at += 1

    def code(self, stops: str) -> None:
        """Go past code, up to one of `stops`."""
        while self.at < len(self.source) and self.source[self.at] not in stops:
            if self.source[self.at] in CLOSING:
                self.block()
            elif not (self.take(STRING) or (self.source.startswith("//", self.at) and self.take(SKIPPED))):
                self.at += 1


def blank(found: re.Match[str]) -> str:
    """As many spaces."""
    return " " * len(found[0])


def literal_numbers(source: str) -> list[str]:
    """Each number that is written out and no declared setting: its line and the text around it."""
    scanner = Scanner(source)
    kinds = [(scanner.words, NUMBER), (scanner.formulas, DECIMAL), (scanner.statements, DECIMAL)]
    found = {
        start + number.start(): number[0]
        for pieces, pattern in kinds
        for start, text in pieces
        for number in pattern.finditer(DECLARED.sub(blank, text))
    }
    return [
        f"line {source.count(chr(10), 0, at) + 1}: {number} in {' '.join(source[max(0, at - 30) : at + 30].split())!r}"
        for at, number in sorted(found.items())
    ]
