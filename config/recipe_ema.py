# The exponential moving average of the weights is what is evaluated and saved.
# python train.py config/recipe_ema.py
# Loss to expect: 1.713 on validation at 6 loops, as without: the schedule has already averaged.

from config.recipe import *

out_dir = "out-recipe-ema"
ema_decay = 0.98
