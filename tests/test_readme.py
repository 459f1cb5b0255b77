"""The README promises only what exists."""

import importlib
import re
from pathlib import Path

from dalle_jax import config

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / 'README.md').read_text()


def test_the_two_commands_are_what_ci_runs():
    ci = (ROOT / '.ci' / 'run').read_text()
    for command in ('pip install -e . && python -m dalle_jax.quickstart',
                    "pip install -e '.[test]' && pytest"):
        assert f'\n{command}\n' in TEXT
        assert command.replace('pip install', 'pip install -q') in ci


def test_verbs_and_experiments_exist():
    verbs = set(re.findall(r'python -m (dalle_jax\.\w+)', TEXT))
    assert len(verbs) >= 5
    for verb in verbs:
        assert importlib.util.find_spec(verb), verb
    specs = set(re.findall(r'--config (\S+)', TEXT))
    assert len(specs) >= 6
    for spec in specs:
        config.load(spec.rstrip('`.'))


def test_every_variant_of_the_table_loads():
    for file, variants in re.findall(r'\| `(experiments/\w+\.py)` \| (.*) \|', TEXT):
        names = re.findall(r'`([\w.]+)`', variants)
        assert names
        for name in names:
            config.load(f'{file}:{name}')


def test_files_of_the_map_exist():
    section = TEXT.split('## Where things are')[1].split('##')[0]
    folder = None
    for name in re.findall(r'`([\w/.]+\.py)`', section):
        if '/' in name and (ROOT / name).exists():
            folder = (ROOT / name).parent
            continue
        assert (folder / name).exists() or (ROOT / 'dalle_jax' / name).exists() or (
            ROOT / name).exists(), name
