"""What a training stands on, from its experiment: frozen runs, data, tokenizer, sizes, the task."""

import base64
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dalle_jax import config as config_lib
from dalle_jax import distributed, machine, runs
from dalle_jax.data import sources
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.models.context import Frozen
from dalle_jax.training import partition
from dalle_jax.training.step import Task

BPE_CAPTIONS = 200_000  # sentencepiece's vocabulary hardly changes beyond this many


class Inputs(NamedTuple):
    """Of one training.

    Attributes:
      experiment: with the sizes that its tokenizers have.
      model: module.
      frozen: role -> context.Frozen.
      spec: name -> ShapeDtypeStruct of one example.
      train, valid: sources of records.
      tokenizer: of captions, or None.
    """

    experiment: config_lib.Experiment
    model: ModuleType
    frozen: Mapping[str, Frozen]
    spec: Mapping[str, jax.ShapeDtypeStruct]
    train: Any
    valid: Any
    tokenizer: Any


def open_inputs(experiment: config_lib.Experiment, workdir: str | Path) -> Inputs:
    """Opens everything; trains the BPE where there is none, in the first process.

    Raises:
      RunError, ConfigError and what sources raise, in all processes.
    """
    model = config_lib.model_module(experiment.model)
    with distributed.together('opening the data and frozen runs'):
        loaded = _load_frozen(experiment)
        frozen = {role: Frozen(r.module, r.config, r.params) for role, r in loaded.items()
                  if role == 'image'}
        for role, f in frozen.items():
            if not hasattr(f.module, 'decode'):
                raise runs.RunError(f'frozen.{role}={experiment.frozen[role]!r} is a '
                                    f'{loaded[role].experiment.model} run; name an image '
                                    'tokenizer, such as a dVAE run')
        from_tokens = experiment.data.source == 'tokens'
        # Where the source has codes, no image is turned into them.
        spec = model.batch_spec(experiment.arch, {} if from_tokens else frozen)
        if from_tokens and 'codes' not in spec:
            raise runs.RunError(f"the {experiment.model} is trained on images, and source 'tokens' "
                                'has only codes of them; give the images they were made of')
        if not from_tokens and 'image' not in spec:
            raise runs.RunError(f'the {experiment.model} reads images through a tokenizer: name a '
                                'finished dVAE run with --config.frozen.image=RUN')
        train, valid = (sources.open_source(experiment.data, split, 'text' in spec)
                        for split in ('train', 'valid'))
        image_tokenizer = frozen['image'].config if frozen else None
        if from_tokens:
            image_tokenizer = train.image_tokenizer
            _check_codes(experiment, loaded, image_tokenizer)
            experiment = dataclasses.replace(experiment, data=dataclasses.replace(
                experiment.data, tokenizer=image_tokenizer.fingerprint))
    tokenizer = _tokenizer(experiment, loaded, train, workdir) if 'text' in spec else None
    if hasattr(model, 'fit'):
        experiment = dataclasses.replace(experiment, arch=model.fit(
            experiment.arch, text_vocab=tokenizer.vocab_size,
            image_tokenizer_config=image_tokenizer))
        spec = model.batch_spec(experiment.arch, {} if from_tokens else frozen)
    return Inputs(experiment, model, frozen, spec, train, valid, tokenizer)


def pipeline(inputs: Inputs, train: bool, mesh: Mesh | None, batch_size: int = 0) -> Pipeline:
    """Batches of the training records, or of the held-out ones.

    Args:
      mesh: on which every process has its own rows of a batch; None: all rows in all processes.
      batch_size: 0: the experiment's.
    """
    data, spec = inputs.experiment.data, inputs.spec
    size = spec['image'].shape[0] if 'image' in spec else None
    batch_size = batch_size or data.batch_size
    return Pipeline(
        inputs.train if train else inputs.valid, batch_size=batch_size,
        seed=inputs.experiment.seed, image_size=(train and data.image_size) or size,
        grid=None if size else spec['codes'].shape,
        text_length=spec['text'].shape[0] if 'text' in spec else None, tokenizer=inputs.tokenizer,
        crop=data.crop if train else data.valid_crop,
        bpe_dropout=data.bpe_dropout if train else 0.0, shuffle=train,
        rows=partition.local_rows(mesh, batch_size) if mesh else None)


def make_task(experiment: config_lib.Experiment, mesh: Mesh, dtype: Any = None) -> Task:
    """The experiment's training step on a mesh.

    Args:
      dtype: of matrix products; None: by experiment.precision and this machine.

    Raises:
      ValueError: the mesh cannot split the batch, or the model is not one that is trained here.
    """
    if not hasattr(config_lib.model_module(experiment.model), 'loss'):
        raise ValueError(f'a {experiment.model} is used with published weights (see convert), and '
                         'not trained by this library: it has no loss')
    data, loop = experiment.data, experiment.loop
    partition.check_batch(mesh, data.batch_size, loop.microbatches)
    return Task(config_lib.model_module(experiment.model), experiment.arch, experiment.optimizer,
                data.batch_size, experiment.compression, loop.microbatches,
                dtype or machine.compute_dtype(experiment.precision), loop.prng,
                partition.Partitioner(mesh, experiment.mesh.rules))


def _load_frozen(experiment):
    """role -> Loaded of the runs that the experiment names."""
    loaded = {}
    for role, path in experiment.frozen.items():
        try:
            if path:
                loaded[role] = runs.load(path)
        except runs.RunError as error:
            if role != 'image' or experiment.data.source != 'tokens':
                raise
            raise runs.RunError(f'{error}. Token records need frozen.image for pictures only: '
                                '--config.frozen.image= trains without it') from None
    return loaded


def _check_codes(experiment, loaded, made_by):
    """Only the run that made the codes can turn them into pictures."""
    found = runs.fingerprint(loaded['image'].params) if 'image' in loaded else made_by.fingerprint
    if found != made_by.fingerprint:
        raise runs.RunError(
            f"frozen.image={experiment.frozen['image']!r} has the fingerprint {found}, but the "
            f'codes in {experiment.data.path} are those of {made_by.run} with '
            f'{made_by.fingerprint}: name that run, or encode the images with this one')


def _tokenizer(experiment, loaded, source, workdir):
    """The BPE: this run's own if it is already there, another run's, or trained now."""
    from dalle_jax.data.clip_text import from_bytes
    from dalle_jax.data.text import Tokenizer

    def found():
        if runs.has_checkpoint(workdir):
            return runs.load_tokenizer(workdir)
        if 'text' in loaded:
            if loaded['text'].tokenizer is None:
                raise runs.RunError(f"frozen.text={experiment.frozen['text']!r} is a run without a "
                                    'tokenizer; name a run that was trained on captions')
            return loaded['text'].tokenizer
        started = time.monotonic()
        trained = Tokenizer.train(sources.captions(source, BPE_CAPTIONS), experiment.text_vocab)
        runs.say(f'BPE: {trained.vocab_size} pieces from the training captions in '
                 f'{time.monotonic() - started:.1f} s')
        return trained

    if jax.process_count() == 1:
        return found()
    model = distributed.from_primary(lambda: base64.b64encode(found().model).decode())
    return from_bytes(base64.b64decode(model))
