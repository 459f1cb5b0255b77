"""Makes the fixtures of tests/interop with the released code: python -m tests.interop.parity

Needs `pip install -e '.[parity]'`: PyTorch, transformers, and the authors' packages of CLIP and of
DALL-E's dVAE; and, for VQGAN, `pip install --no-deps taming-transformers-rom1504`. All weights are
random and all sizes tiny; names, formats and arithmetic are theirs. `python -m tests.interop.parity
full` makes none, but compares models of the released sizes, and the whole released list of merges:
4 GB of memory, a minute.
"""

import collections
import importlib.util
import io
import json
import sys
import zipfile
from pathlib import Path

import attr
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from tests.interop.random_weights import random_weights

FIXTURES = Path(__file__).parent / 'fixtures'

TEXT = """a small red star above a large blue ring on a white background
two cats sleep on the old couch while the dog is watching the street
the photo of a mountain lake at sunrise, with clouds and a wooden boat
an illustration of a baby daikon radish in a tutu walking a dog
a store front that has the word openai written on it
the exact same cat on the top as a sketch on the bottom
an armchair in the shape of an avocado, a professional high quality photo
it's what they're saying: we've seen that he'd go if she'll come, i'm sure don't""".split('\n')

CAPTIONS = [
    'a small red star', 'A Photo of the Mountain LAKE, at sunrise!', 'x' * 60, 'the ' * 40,
    '  many   spaces\tand\nlines ', 'number 2024, 3.14 and x86_64', "'s's 'S o'clock",
    'unseen zyx words; (brackets)?!', 'caf\u00e9 na\u00efve \u00fcber', '\u732b\u3068\u72ac 42',
    '\U0001f600 smile', '&amp; tom &amp;amp; jerry &lt;b&gt;', 'a<|endoftext|>b', '_under_score__',
    '\u0660\u0661\u0662 \u00bd \u2167', 'e\u0301 and \u00e9', 'A\u0130I\u0131 \u1e9e\u00df',
    '\ufb01ne \u201cquotes\u201d\u2014dash\u2026', 'caf\u00c3\u00a9 mojibake',
    "it's they've we'll I'M don't",
]


def released(package, module):
    """A module of a released package without its __init__, which wants old dependencies."""
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location(f'released_{module}', folder / f'{module}.py')
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


# -- the text encoding ---------------------------------------------------------------------------


def merges_of(lines, count, byte_to_symbol):
    """Byte-pair merges learned from lines, most frequent first."""
    words = collections.Counter(word for line in lines for word in line.split())
    words = {tuple(byte_to_symbol[b] for b in w.encode()): n for w, n in words.items()}
    words = {(*w[:-1], w[-1] + '</w>'): n for w, n in words.items()}
    merges = []
    while len(merges) < count:
        pairs = collections.Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        joined = {}
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                twin = word[i:i + 2] == best
                out.append(''.join(word[i:i + 2]) if twin else word[i])
                i += 2 if twin else 1
            joined[tuple(out)] = joined.get(tuple(out), 0) + n
        words = joined
    return merges


def text_fixtures():
    """merges.txt, vocab.json, and what both released tokenizers make of the captions."""
    import gzip

    simple = released('clip', 'simple_tokenizer')
    symbols = simple.bytes_to_unicode()
    merges = merges_of(TEXT, 90, symbols)
    lines = '\n'.join(['#version: 0.2', *(' '.join(pair) for pair in merges)]) + '\n'
    (FIXTURES / 'merges.txt').write_text(lines, encoding='utf-8')
    vocab = [*symbols.values()]
    vocab += [v + '</w>' for v in vocab] + [''.join(pair) for pair in merges]
    vocab += ['<|startoftext|>', '<|endoftext|>']
    (FIXTURES / 'vocab.json').write_text(json.dumps({v: i for i, v in enumerate(vocab)}),
                                         encoding='utf-8')
    # The released class reads a gzip file of which it takes a fixed number of lines.
    packed = FIXTURES / 'merges.txt.gz'
    packed.write_bytes(gzip.compress(lines.rstrip('\n').encode(), mtime=0))
    tokenizer = simple.SimpleTokenizer(str(packed))
    theirs = transformers.CLIPTokenizer.from_pretrained(FIXTURES)
    found = [{'caption': c, 'ids': tokenizer.encode(c), 'huggingface': theirs(c)['input_ids'][1:-1]}
             for c in CAPTIONS]
    packed.unlink()
    (FIXTURES / 'captions.json').write_text(json.dumps(found, indent=1))
    return tokenizer


# -- CLIP ----------------------------------------------------------------------------------------


def to_huggingface(state, config):
    """The released names as those of transformers, by transformers' own conventions."""
    model = transformers.CLIPModel(config)
    wanted = model.state_dict()
    blocks = {'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2', 'mlp.c_fc': 'mlp.fc1',
              'mlp.c_proj': 'mlp.fc2', 'attn.out_proj': 'self_attn.out_proj'}
    plain = {
        'visual.conv1.weight': 'vision_model.embeddings.patch_embedding.weight',
        'visual.class_embedding': 'vision_model.embeddings.class_embedding',
        'visual.positional_embedding': 'vision_model.embeddings.position_embedding.weight',
        'visual.ln_pre.': 'vision_model.pre_layrnorm.',
        'visual.ln_post.': 'vision_model.post_layernorm.',
        'token_embedding.weight': 'text_model.embeddings.token_embedding.weight',
        'positional_embedding': 'text_model.embeddings.position_embedding.weight',
        'ln_final.': 'text_model.final_layer_norm.', 'logit_scale': 'logit_scale'}
    out = {'visual_projection.weight': state['visual.proj'].T,
           'text_projection.weight': state['text_projection'].T}
    for name, value in state.items():
        for tower, prefix in (('visual.transformer.resblocks.', 'vision_model.encoder.layers.'),
                              ('transformer.resblocks.', 'text_model.encoder.layers.')):
            if name.startswith(tower):
                number, inner = name.removeprefix(tower).split('.', 1)
                if inner.startswith('attn.in_proj'):
                    for part, letter in zip(value.chunk(3), 'qkv'):
                        end = inner.rsplit('_', 1)[1]
                        out[f'{prefix}{number}.self_attn.{letter}_proj.{end}'] = part
                else:
                    for a, b in blocks.items():
                        inner = inner.replace(a + '.', b + '.')
                    out[prefix + number + '.' + inner] = value
        for a, b in plain.items():
            if name == a or a.endswith('.') and name.startswith(a):
                out[name.replace(a, b)] = value
    assert out.keys() == {k for k in wanted if 'position_ids' not in k}
    model.load_state_dict(out, strict=False)
    return model.eval(), {k: v.contiguous() for k, v in out.items()}


def clip_fixtures(tokenizer):
    """One tiny CLIP in both layouts, and its embeddings."""
    code = released('clip', 'model')
    torch.manual_seed(0)
    vocab, size, patch, context = len(tokenizer.encoder), 12, 4, 12
    # Nine layers and two: stacked parameters, and plain ones.
    model = code.CLIP(20, size, 1, 64, patch, context, vocab, 24, 3, 2)
    model.visual = code.VisionTransformer(size, patch, 16, 9, 2, 20)  # heads 8 wide, not 64
    for name, value in model.named_parameters():
        with torch.no_grad():  # gains and biases too: a swap of two of them must show
            value.add_(0.1 * torch.randn_like(value))
            value.copy_(value.half().float())
    model.eval()
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    images = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((torch.tensor(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    start, end = tokenizer.encoder['<|startoftext|>'], tokenizer.encoder['<|endoftext|>']
    captions = ['a small red star', 'two cats!', TEXT[2], 'dog']
    ids = np.zeros((4, context), np.int64)  # as released: cut, with the end in the last place
    for row, caption in zip(ids, captions):
        found = [start, *tokenizer.encode(caption), end][:context]
        found[-1] = end
        row[:len(found)] = found
    with torch.no_grad():
        of_image, of_text = model.encode_image(pixels), model.encode_text(torch.tensor(ids))
        logits = model(pixels, torch.tensor(ids))[0]
    config = transformers.CLIPConfig(
        projection_dim=20,
        text_config=dict(vocab_size=vocab, hidden_size=24, intermediate_size=96,
                         num_hidden_layers=2, num_attention_heads=3,
                         max_position_embeddings=context, eos_token_id=end, bos_token_id=start,
                         projection_dim=20),
        vision_config=dict(hidden_size=16, intermediate_size=64, num_hidden_layers=9,
                           num_attention_heads=2, image_size=size, patch_size=patch,
                           projection_dim=20))
    theirs, renamed = to_huggingface(state, config)
    with torch.no_grad():
        other = theirs(input_ids=torch.tensor(ids), pixel_values=pixels).logits_per_image
    print('released and transformers differ by', float((logits - other).abs().max()))
    half = {k: v.half() for k, v in renamed.items()}
    half['text_model.embeddings.position_ids'] = torch.arange(context)[None]
    save_file(half, FIXTURES / 'clip_huggingface.safetensors')
    config.save_pretrained(FIXTURES)  # config.json
    np.savez_compressed(FIXTURES / 'clip.npz', images=images, captions=captions, ids=ids,
                        of_image=of_image, of_text=of_text, logits=logits, huggingface=other)

    for name in ('context_length', 'vocab_size'):
        number = torch.tensor(getattr(model, name))
        delattr(model, name)
        model.register_buffer(name, number)
    model.register_buffer('input_resolution', torch.tensor(size))
    traced = torch.jit.trace(model, (pixels[:1], torch.tensor(ids[:1])), check_trace=False)
    code.convert_weights(model)  # the archive's matrices are half precision
    whole = io.BytesIO()
    torch.jit.save(traced, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(FIXTURES / 'clip_openai.pt', 'w') as to:
        for info in source.infolist():  # without the debugging tables, the larger part of it
            if not info.filename.endswith('.debug_pkl'):
                info.date_time = (1980, 1, 1, 0, 0, 0)
                to.writestr(info, source.read(info))
    torch.save({k: v for k, v in model.state_dict().items() if k.startswith('ln_final')},
               FIXTURES / 'state_dict.pth')


def image_fixtures():
    """What the processor of transformers makes of images that are no squares of its size."""
    rng = np.random.default_rng(1)
    found = {}
    processor = transformers.CLIPImageProcessor(
        size={'shortest_edge': 12}, crop_size={'height': 12, 'width': 12}, do_rescale=False,
        do_normalize=False)
    for height, width in ((12, 12), (40, 40), (29, 47), (50, 25), (7, 9), (13, 30)):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(image).resize((width, height)))
        out = processor(Image.fromarray(smooth), return_tensors='np')['pixel_values'][0]
        found[f'in_{height}_{width}'] = smooth
        found[f'out_{height}_{width}'] = out.transpose(1, 2, 0)
    np.savez_compressed(FIXTURES / 'resized.npz', **found)


# -- the dVAE ------------------------------------------------------------------------------------


def dvae_fixtures():
    """A tiny encoder.pkl and decoder.pkl as torch.save writes the released classes."""
    from dall_e import map_pixels, unmap_pixels
    from dall_e.decoder import Decoder
    from dall_e.encoder import Encoder

    torch.manual_seed(1)
    with attr.validators.disabled():  # they ask for at least 64 channels
        encoder = Encoder(n_hid=4, vocab_size=24)
        decoder = Decoder(n_hid=4, n_init=6, vocab_size=24)
    for network in (encoder, decoder):
        for name, value in network.named_parameters():
            with torch.no_grad():
                # The residual branches, which are divided by 64, must show.
                value.mul_(3 if 'res_path' in name else 1).add_(0.1 * torch.randn_like(value))
                value.copy_(value.half().float())
    images = np.random.default_rng(2).integers(0, 256, (3, 16, 24, 3), np.uint8)
    images = images // 4 + 16 * np.arange(12).repeat(2)[:, None].astype(np.uint8) % 192
    with torch.no_grad():
        x = map_pixels(torch.tensor(images).permute(0, 3, 1, 2).float() / 255)
        offset = encoder(x).mean((0, 2, 3))  # so that many codes are chosen
        encoder.blocks.output.conv.b.sub_(offset.half().float())
        logits = encoder(x)
        codes = logits.argmax(1)
        hot = torch.nn.functional.one_hot(codes, 24).permute(0, 3, 1, 2).float()
        maps = decoder(hot)
        decoded = unmap_pixels(torch.sigmoid(maps[:, :3]))
    print(len(codes.unique()), 'codes of the dVAE are used')
    torch.save(encoder, FIXTURES / 'dalle_encoder.pkl')
    torch.save(decoder, FIXTURES / 'dalle_decoder.pkl')
    np.savez_compressed(
        FIXTURES / 'dvae.npz', images=images, codes=codes, logits=logits.permute(0, 2, 3, 1),
        maps=maps.permute(0, 2, 3, 1), decoded=decoded.permute(0, 2, 3, 1))


def vqgan_fixtures():
    """Names and shapes of two tiny VQGANs, and what they make of random_weights(name, shape)."""
    from taming.modules.diffusionmodules.model import Decoder, Encoder
    from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2

    images = np.random.default_rng(3).integers(0, 256, (2, 4, 6, 3), np.uint8)
    images = images.repeat(4, 1).repeat(4, 2)
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    found = {'images': images}
    for kind in ('nearest', 'logits'):
        sizes = dict(ch=32, out_ch=3, ch_mult=(1, 2, 2) if kind == 'nearest' else (1, 2),
                     num_res_blocks=1, attn_resolutions=[4] if kind == 'nearest' else [8],
                     in_channels=3, resolution=16, z_channels=12, double_z=False)
        model = torch.nn.Module()
        model.encoder, model.decoder = Encoder(**sizes), Decoder(**sizes)
        width = 8 if kind == 'nearest' else 12  # the released Gumbel model has them alike
        model.quant_conv = torch.nn.Conv2d(12, width, 1)
        model.post_quant_conv = torch.nn.Conv2d(width, 12, 1)
        model.quantize = (VectorQuantizer2(20, width, 0.25) if kind == 'nearest'
                          else GumbelQuantize(12, width, 20))
        state = {name: torch.tensor(random_weights(name, value.shape))
                 for name, value in model.state_dict().items()}
        model.load_state_dict(state)
        model.eval()
        with torch.no_grad():
            z = model.quant_conv(model.encoder(x))
            if kind == 'nearest':
                quantised, _, (_, _, codes) = model.quantize(z)
                codes = codes.reshape(len(z), *z.shape[2:])
            else:  # without the noise
                codes = model.quantize.proj(z).argmax(1)
                quantised = model.quantize.embed(codes).permute(0, 3, 1, 2)
            decoded = model.decoder(model.post_quant_conv(quantised))
        print(kind, len(codes.unique()), 'codes of 20', decoded.std().item())
        found |= {f'{kind}_names': json.dumps({n: list(v.shape) for n, v in state.items()}),
                  f'{kind}_latent': z.permute(0, 2, 3, 1), f'{kind}_codes': codes,
                  f'{kind}_decoded': decoded.permute(0, 2, 3, 1)}
    np.savez_compressed(FIXTURES / 'vqgan.npz', **found)


def file_fixtures():
    """All that a PyTorch file can say about a tensor."""
    base = torch.arange(24.)
    zoo = {
        'half': torch.arange(4).half() / 3, 'bfloat16': torch.arange(4).bfloat16() / 3,
        'double': torch.arange(4).double() / 3, 'long': torch.tensor([2**40, -1]),
        'bool': torch.tensor([True, False]), 'scalar': torch.tensor(2.5),
        'empty': torch.zeros(0, 3), 'transposed': base.reshape(4, 6).T,
        'window': base.reshape(4, 6)[1:3, 2:5], 'every_third': base[1::3], 'shared': base,
        'parameter': torch.nn.Parameter(base[:2].clone()),
        'nested': {'inner': base[:1].clone()}, 'epoch': 3, 'note': 'text', 'options': [1, 'a'],
    }
    torch.save(zoo, FIXTURES / 'zoo.pth')
    torch.save(zoo, FIXTURES / 'legacy.pth', _use_new_zipfile_serialization=False)


# -- the released sizes ----------------------------------------------------------------------------


def full():
    """The largest differences between the released code and this library."""
    from dalle_jax.data.clip_text import ClipTokenizer
    from dalle_jax.interop import clip as to_clip
    from dalle_jax.interop import dvae as to_dvae
    from dalle_jax.interop import vqgan as to_vqgan
    from dalle_jax.models import clip, dvae, vqgan

    # -- CLIP, from captions and images to logits --------------------------------------------
    code, simple = released('clip', 'model'), released('clip', 'simple_tokenizer')
    torch.manual_seed(0)
    theirs = code.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
    for value in theirs.parameters():
        value.data.add_(0.02 * torch.randn_like(value))
    tokenizer = simple.SimpleTokenizer()
    ours = ClipTokenizer.read(simple.default_bpe(), 49408)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(CAPTIONS), 14, 14, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    ids = np.zeros((len(CAPTIONS), 77), np.int64)
    for row, caption in zip(ids, CAPTIONS):
        found = [49406, *tokenizer.encode(caption), 49407][:77]
        found[-1] = 49407
        row[:len(found)] = found
    pixels = (torch.tensor(images) / 255 - torch.tensor(clip.MEAN)) / torch.tensor(clip.STD)
    with torch.no_grad():
        expected = theirs(pixels.permute(0, 3, 1, 2), torch.tensor(ids))[0].numpy()
    config, params = to_clip.from_published(
        {name: value.numpy() for name, value in theirs.state_dict().items()})
    assert config == clip.PRESETS['b32']
    text, _ = ours.batch(CAPTIONS, 76)
    found = np.exp(params['log_scale']) * (
        clip.embed_image(params, config, images) @ clip.embed_text(params, config, text).T)
    print('ViT-B/32: logits', float(np.abs(found - expected).max()), 'of', float(np.ptp(expected)))

    # -- the dVAE ----------------------------------------------------------------------------
    from dall_e import map_pixels
    from dall_e.decoder import Decoder
    from dall_e.encoder import Encoder

    networks = Encoder(), Decoder()
    images = torch.tensor(images[:2, :64, :64])
    with torch.no_grad():
        logits = networks[0](map_pixels(images.permute(0, 3, 1, 2).float() / 255))
        codes = logits.argmax(1)
        maps = networks[1](torch.nn.functional.one_hot(codes, 8192).permute(0, 3, 1, 2).float())
    config, params = to_dvae.from_published(
        *({name: value.numpy() for name, value in network.state_dict().items()}
          for network in networks))
    assert config == dvae.Config()
    found = dvae._encoder(config).apply({'params': params['encoder']},
                                        dvae.map_pixels(images.numpy()))[1]
    print('dVAE: logits', float(np.abs(found - logits.permute(0, 2, 3, 1).numpy()).max()), 'of',
          float(logits.max() - logits.min()))
    found = dvae.decode_embedded(params, config, dvae.lookup(params, codes.numpy()), np.float32)
    print('dVAE: maps', float(np.abs(found - maps.permute(0, 2, 3, 1).numpy()).max()), 'of',
          float(maps.max() - maps.min()))

    # -- VQGAN f16 ---------------------------------------------------------------------------
    from taming.modules.diffusionmodules.model import Decoder, Encoder

    sizes = dict(ch=128, out_ch=3, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2,
                 attn_resolutions=[16], in_channels=3, resolution=256, z_channels=256,
                 double_z=False)
    network = torch.nn.ModuleDict({
        'encoder': Encoder(**sizes), 'decoder': Decoder(**sizes),
        'quant_conv': torch.nn.Conv2d(256, 256, 1),
        'post_quant_conv': torch.nn.Conv2d(256, 256, 1),
        'quantize': torch.nn.ModuleDict({'embedding': torch.nn.Embedding(16384, 256)})})
    config, params = to_vqgan.from_published(
        {name: value.numpy() for name, value in network.state_dict().items()})
    assert config == vqgan.Config()
    with torch.no_grad():
        z = network['quant_conv'](network['encoder'](images.permute(0, 3, 1, 2) / 127.5 - 1))
        codes = torch.arange(32).reshape(2, 4, 4)
        embedded = network['quantize']['embedding'](codes).permute(0, 3, 1, 2)
        decoded = network['decoder'](network['post_quant_conv'](embedded)).permute(0, 2, 3, 1)
    found = vqgan.latent(params, config, images.numpy())
    print('VQGAN: latent', float(np.abs(found - z.permute(0, 2, 3, 1).numpy()).max()), 'of',
          float(z.max() - z.min()))
    found = vqgan.decode(params, config, codes.numpy())
    expected = np.clip((decoded.numpy() + 1) / 2, 0, 1)
    print('VQGAN: images', float(np.abs(found - expected).max()), 'of', float(np.ptp(expected)))


if __name__ == '__main__':
    if sys.argv[1:] == ['full']:
        sys.exit(full())
    FIXTURES.mkdir(exist_ok=True)
    clip_fixtures(text_fixtures())
    image_fixtures()
    dvae_fixtures()
    vqgan_fixtures()
    file_fixtures()
