# Hold, then decay: the full learning rate for 600 steps, then linearly to 0.
# python train.py config/recipe_wsd.py
# Loss to expect: 1.723 on validation at 6 loops; 1.713 with cosine.

from config.recipe import *

out_dir = "out-recipe-wsd"
lr_schedule = "wsd"
hold_iters = 600
