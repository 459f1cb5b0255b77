"""Makes originals.npz, what PyTorch's FID, IS and KID say: python -m tests.metrics.originals.

Needs pip install -e '.[parity]'. Weights and images are drawn from seeds, by functions that the
tests use as well, so that the file holds results only.
"""

import tempfile
from pathlib import Path

import numpy as np

STORED = Path(__file__).with_name('originals.npz')


def weights(shapes):
    """Random weights of a state dict's names and shapes; activations keep their size."""
    rng, found = np.random.RandomState(0), {}
    for name, shape in sorted(shapes.items()):
        match name.rsplit('.', 2)[-2:]:
            case 'conv' | 'fc', 'weight':
                most = (6 / np.prod(shape[1:])) ** 0.5
                low, high = -most, most
            case 'bn', 'weight' | 'running_var':
                low, high = 0.5, 1.5
            case _:
                low, high = -0.3, 0.3
        found[name] = rng.uniform(low, high, shape).astype(np.float32)
    return found


def images(height, width, count=2):
    """uint8 [count, height, width, 3]: noise, darker towards the right."""
    noise = np.random.RandomState(1).randint(0, 256, (count, height, width, 3))
    return (noise * np.linspace(1, 0.3, width)[:, None]).astype(np.uint8)


def features(seed, images=400, size=48):
    """float32 [images, size], correlated, not negative; differently distributed for each seed."""
    rng = np.random.RandomState(seed)
    mixed = rng.uniform(-1, 1, (images, size)) @ rng.uniform(-1, 1, (size, size))
    return np.maximum(mixed + rng.uniform(-1, 2, size), 0).astype(np.float32)


SIZES = ((17, 50), (31, 9), (24, 24))  # resized to 20 x 20


def main():
    import pytorch_fid.fid_score
    import pytorch_fid.inception
    import torch
    from torch_fidelity import metric_fid, metric_isc, metric_kid
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x)

    def torch_layout(x):
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

    found = {}

    # -- the network -----------------------------------------------------------------------------
    bare = pytorch_fid.inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    shapes = {name: tuple(x.shape) for name, x in bare.state_dict().items()
              if not name.endswith('num_batches_tracked')}
    found['names'] = np.array([f'{name} {" ".join(map(str, s))}' for name, s in shapes.items()])
    state = {name: torch.from_numpy(x) for name, x in weights(shapes).items()}
    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: {
        name: state.get(name, x) for name, x in bare.state_dict().items()}
    pictures = torch_layout(images(40, 52))
    with torch.no_grad():
        with tempfile.NamedTemporaryFile() as file:
            torch.save(pytorch_fid.inception.load_state_dict_from_url(), file.name)
            names = list(FeatureExtractorInceptionV3.get_provided_features_list())
            network = FeatureExtractorInceptionV3('inception', names, file.name)
        for name, x in zip(names, network(pictures)):
            found[f'tensorflow/{name}'] = x.numpy()
        network = pytorch_fid.inception.InceptionV3([0, 1, 2, 3]).eval()
        for x in network(pictures / 255):
            found[f'pytorch/{x.shape[1]}'] = x.mean((2, 3)).numpy()

    # -- resizing --------------------------------------------------------------------------------
        for height, width in SIZES:
            x = torch_layout(images(height, width)).float()
            key = f'{height}x{width}'
            found[f'resize/tensorflow/{key}'] = interpolate_bilinear_2d_like_tensorflow1x(
                x, (20, 20), align_corners=False).numpy()
            found[f'resize/pytorch/{key}'] = torch.nn.functional.interpolate(
                x / 255, (20, 20), mode='bilinear', align_corners=False).numpy()
            # The antialiased bicubic resize of PyTorch is Pillow's.
            found[f'resize/clean/{key}'] = torch.nn.functional.interpolate(
                x, (20, 20), mode='bicubic', align_corners=False, antialias=True).numpy()

    # -- distances -------------------------------------------------------------------------------
    a, b = (torch.from_numpy(features(seed)) for seed in (0, 1))
    statistics = [metric_fid.fid_features_to_statistics(x) for x in (a, b)]
    found['fid/torch-fidelity'] = metric_fid.fid_statistics_to_metric(*statistics, False)[
        metric_fid.KEY_METRIC_FID]
    found['fid/pytorch-fid'] = pytorch_fid.fid_score.calculate_frechet_distance(
        *(x for s in statistics for x in (s['mu'], s['sigma'])))
    for name, shuffle in (('ordered', False), ('shuffled', True)):
        found[f'is/{name}'] = list(metric_isc.isc_features_to_metric(a, 7, shuffle, 2020).values())
    found['kid'] = list(metric_kid.kid_features_to_metric(
        a, b, kid_subsets=10, kid_subset_size=100, verbose=False).values())
    np.savez_compressed(STORED, **found)


if __name__ == '__main__':
    main()
