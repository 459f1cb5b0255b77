"""Figures 7 and 9 of Ramesh et al. 2021, the latter read off by eye: to half a point of FID and a
tenth of IS, from the solid lines, that is with the real images that overlap with the training data.
"""

# Question -> percent of 1,000 captions of MS-COCO for DALL-E and for DF-GAN, best of five votes.
HUMAN = {'realism': (90.0, 10.0), 'caption': (93.3, 6.6)}

RADII = (0, 1, 2, 4, 8)
NUMBERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

# Data set -> model -> values at RADII.
FID = {
    'coco': {'DALL-E (paper)': (28.4, 28.7, 46.5, 85.3, 87.2),
             'DF-GAN (paper)': (27.0, 34.7, 56.8, 92.7, 99.0),
             'DM-GAN (paper)': (27.2, 39.6, 74.1, 120.9, 114.5),
             'AttnGAN (paper)': (35.1, 44.2, 73, 109.6, 105.5)},
    'cub': {'DALL-E (paper)': (56.1, 50.6, 56.7, 74.0, 70.4),
            'DF-GAN (paper)': (23.3, 28.7, 46.1, 65.0, 68.9),
            'DM-GAN (paper)': (18.7, 23.9, 42.1, 62.6, 67.2),
            'AttnGAN (paper)': (24.8, 38.0, 61.9, 79.8, 74.1)},
}
IS = {
    'coco': {'DALL-E (paper)': (17.9, 19.3, 17.8, 11.1, 6.0),
             'DF-GAN (paper)': (18.6, 16.2, 13.0, 9.2, 5.5),
             'DM-GAN (paper)': (32.2, 27.2, 17.4, 9.4, 5.1),
             'AttnGAN (paper)': (23.3, 19.7, 14.2, 8.3, 4.9)},
    'cub': {'DALL-E (paper)': (2.64, 2.82, 2.89, 2.51, 1.42)},
}

# On MS-COCO by the number of candidates of which CLIP chose, at NUMBERS.
RERANKED = {'fid': (34.6, 31.3, 29.4, 28.4, 27.9, 27.7, 27.6, 27.4, 27.5, 27.7),
            'inception_score': (15.4, 16.3, 17.2, 17.6, 17.8, 18.0, 18.0, 18.1, 18.0, 17.9)}
