# Shifted labels: each window is told by a token before it how many tokens ahead to predict.
# python train.py config/recipe_shift.py
# Loss to expect: 1.767 on validation at 6 loops for the next token (1.713 without), then 2.62,
# 3.06, 3.20.

from config.recipe import *

out_dir = "out-recipe-shift"
predict_ahead = True
max_shift = 4
label_shift_prob = 0.7
