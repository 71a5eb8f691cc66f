"""Print the size and the density of each file: python tests/house.py [FILE ...]

tokens: names, numbers, operators and strings, without comments and docstrings. A code line is a
line that has one. prose: lines of docstrings and of comments on lines of their own, per 100 code
lines.
Above 10 tokens a code line, a file says too much at once.
"""
import ast
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENCODING, tokenize.ENDMARKER}


def docstring_lines(source):
    """The numbers of the lines that docstrings take."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, 'body', None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
            continue
        value = body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            lines.update(range(value.lineno, value.end_lineno + 1))
    return lines


def measure(path):
    """(lines, code lines, tokens, prose lines)"""
    source = path.read_text()
    prose = docstring_lines(source)
    code = set()
    tokens = 0
    with open(path, 'rb') as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in LAYOUT or token.start[0] in prose:
                continue
            tokens += 1
            code.update(range(token.start[0], token.end[0] + 1))
    lines = source.splitlines()
    comments = sum(line.strip().startswith('#') for line in lines)
    return len(lines), len(code), tokens, len(prose) + comments


if __name__ == '__main__':
    paths = [Path(name) for name in sys.argv[1:]] or sorted(ROOT.glob('*.py'))
    print(f'{"file":24} {"lines":>6} {"tokens":>7} {"tokens/line":>12} {"prose/100":>10}')
    totals = [0, 0, 0, 0]
    for path in paths:
        numbers = measure(path)
        totals = [a + b for a, b in zip(totals, numbers)]
        lines, code, tokens, prose = numbers
        print(f'{path.name:24} {lines:6} {tokens:7,} {tokens / code:12.1f} '
              f'{100 * prose / code:10.0f}')
    lines, code, tokens, prose = totals
    print(f'{"sum":24} {lines:6} {tokens:7,} {tokens / code:12.1f} {100 * prose / code:10.0f}')
