# Spectral clipping: no matrix of the looped block may stretch anything more than four times.
# python train.py config/recipe_clip.py
# Loss to expect: 1.721 on validation at 6 loops; 1.713 without.

from config.recipe import *

out_dir = "out-recipe-clip"
spectral_clip_beta = 4.0
