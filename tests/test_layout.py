"""The import direction, and the one home of each heavy library."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'dalle_jax'
VERBS = {'quickstart', 'train', 'encode', 'sample', 'evaluate', 'vote', 'compare', 'plan',
         'benchmark', 'convert', 'export', '__main__', 'data.__main__'}
HOMES = {
    'orbax': {'training.checkpoint'},
    'ml_collections': {'config'},
    'sentencepiece': {'data.text'},
    'tensorflow_datasets': {'data.tfds'},
    'safetensors': {'interop.files'},
    'ftfy': {'data.clip_text'},
    'regex': {'data.clip_text'},
}


def modules():
    for path in sorted(PACKAGE.rglob('*.py')):
        name = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
        yield name.removesuffix('.__init__'), path


def imports(path, top_level_only=False):
    """Dotted names imported by a file; those of this package without 'dalle_jax.'."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in (tree.body if top_level_only else ast.walk(tree)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            # `from package import x` may import a module x.
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return found


def own(found):
    names = {name for name, _ in modules()}
    return {f.removeprefix('dalle_jax.') for f in found if f.startswith('dalle_jax.')} & names


GRAPH = {name: own(imports(path)) - {name} for name, path in modules()}


def test_acyclic():
    done, path = set(), []

    def visit(name):
        assert name not in path, f'import cycle: {" -> ".join([*path, name])}'
        if name in done:
            return
        path.append(name)
        for other in GRAPH[name]:
            visit(other)
        path.pop()
        done.add(name)

    for name in GRAPH:
        visit(name)


def test_only_quickstart_imports_verbs():
    for name, found in GRAPH.items():
        if name != 'quickstart':
            assert not found & VERBS, f'{name} imports the verb {found & VERBS}'


@pytest.mark.parametrize('package,allowed', [
    ('models', {'models'}),
    ('data', {'data'}),
    ('training', {'training', 'models'}),
    ('planning', {'planning', 'training', 'models'}),
    ('interop', {'interop', 'models'}),
    ('metrics', {'metrics', 'models', 'data', 'report'}),
])
def test_package_imports_only(package, allowed):
    for name, found in GRAPH.items():
        if name.split('.')[0] == package and name not in VERBS:
            strangers = {f for f in found if f.split('.')[0] not in allowed}
            assert not strangers, f'{name} imports {strangers}'


def test_models_do_not_import_each_other():
    models = ('dvae', 'dalle', 'clip', 'vqgan', 'words')
    for name in models:
        others = {f'models.{m}' for m in models} - {f'models.{name}'}
        assert not GRAPH[f'models.{name}'] & others


def test_data_never_imports_jax():
    for name, path in modules():
        if name.split('.')[0] == 'data':
            assert not {f for f in imports(path) if f.split('.')[0] in ('jax', 'flax')}, name


@pytest.mark.parametrize('library', HOMES)
def test_one_home(library):
    users = {name for name, path in modules()
             if any(f.split('.')[0] == library for f in imports(path))}
    assert users == HOMES[library]


def test_optional_libraries_are_imported_where_used():
    """A bare accelerator machine has jax, flax, optax, orbax, numpy: importing must work there."""
    absent = {'ml_collections', 'tensorflow_datasets', 'array_record', 'grain', 'tensorboardX',
              'safetensors', 'ftfy', 'regex'}
    for name, path in modules():
        top = {f.split('.')[0] for f in imports(path, top_level_only=True)}
        assert not top & absent, f'{name} imports {top & absent} at import time'


def test_experiments_import_only_sizes():
    """And common.py the dataclasses of the sections, for their defaults."""
    for path in (ROOT / 'experiments').glob('*.py'):
        if path.name == 'common.py':
            continue
        for found in imports(path):
            allowed = found.split('.')[0] in ('ml_collections', 'experiments')
            assert allowed or found.startswith('dalle_jax.models'), f'{path.name}: {found}'


def test_files_are_short():
    for path in [*PACKAGE.rglob('*.py'), *(ROOT / 'experiments').glob('*.py')]:
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, f'{path.name} has {len(lines)} lines'
        for number, line in enumerate(lines, start=1):
            assert len(line) <= 100, f'{path.name}:{number} has {len(line)} columns'


def test_top_level():
    allowed = {'dalle_jax', 'experiments', 'launch', 'tests', 'setup.cfg', 'README.md', 'LICENSE',
               'pyproject.toml'}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith('.')}
    generated = {'runs', 'build', 'dalle_jax.egg-info', '__pycache__'}
    assert found - generated <= allowed
