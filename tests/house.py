"""Hold the house to its size: python tests/house.py.

tokens: names, numbers, operators and strings, without comments and docstrings. A code line is a
line that has one. prose: lines of docstrings and of comments on lines of their own, per 100 code
lines.
CEILINGS only ever fall. A file that outgrows its own needs another to shrink, or to say less.
"""
import ast
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = dict(                        # tokens
    product=26_200,                     # the seven files and images/
    experiments=7_150,
    tests=23_700)
DENSITY = 10                            # tokens a code line of the product
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


def table(paths):
    """Prints a line a file. Returns the sums of measure."""
    totals = [0, 0, 0, 0]
    for path in paths:
        numbers = measure(path)
        totals = [a + b for a, b in zip(totals, numbers)]
        print_line(path.relative_to(ROOT), numbers)
    return totals


def print_line(name, numbers):
    lines, code, tokens, prose = numbers
    print(f'{str(name):28} {lines:6} {tokens:7,} {tokens / code:12.1f} {100 * prose / code:10.0f}')


if __name__ == '__main__':
    print(f'{"file":28} {"lines":>6} {"tokens":>7} {"tokens/line":>12} {"prose/100":>10}')
    rooms = dict(
        product=[*ROOT.glob('*.py'), *ROOT.glob('images/*.py')],
        experiments=ROOT.glob('experiments/*.py'),
        tests=ROOT.glob('tests/*.py'))
    too_much = []
    for room, paths in rooms.items():
        totals = table(sorted(paths))
        print_line(f'{room}, at most {CEILINGS[room]:,}', totals)
        print()
        if totals[2] > CEILINGS[room]:
            too_much.append(f'{room} has {totals[2]:,} tokens')
        if room == 'product' and totals[2] / totals[1] > DENSITY:
            too_much.append(f'product has {totals[2] / totals[1]:.1f} tokens a line')
    sys.exit('; '.join(too_much) or None)
