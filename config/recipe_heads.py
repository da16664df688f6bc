# Four heads predict the next four tokens in one pass.
# python train.py config/recipe_heads.py
# Loss to expect: 1.741 on validation at 6 loops for the next token (1.713 without), then 2.50,
# 2.86, 3.05.

from config.recipe import *

out_dir = "out-recipe-heads"
n_ahead = 4
ahead_weight = 0.3
