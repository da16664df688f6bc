# Deep supervision: the loss after every loop, those of later loops weigh more.
# python train.py config/recipe_deep.py
# Loss to expect: 1.747 on validation at 4 loops (1.737 without), 1.779 at two, 1.948 at one,
# 1.808 at eight.

from config.recipe_fixed import *

out_dir = "out-recipe-deep"
objective = "deep"
loss_weighting = "linear"
