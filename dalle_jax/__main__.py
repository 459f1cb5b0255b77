"""Lists the verbs: python -m dalle_jax"""

import ast
from pathlib import Path

VERBS = ('quickstart', 'train', 'encode', 'sample', 'evaluate', 'vote', 'compare', 'plan',
         'convert', 'export', 'benchmark')


def main():
    folder = Path(__file__).parent
    print('python -m dalle_jax.<verb> --help\n')
    for verb in (*VERBS, 'data'):
        file = folder / f'{verb}.py' if verb in VERBS else folder / verb / '__main__.py'
        print(f'  {verb:11}{ast.get_docstring(ast.parse(file.read_text())).splitlines()[0]}')


if __name__ == '__main__':
    main()
