# Self-distillation: the last loop teaches those before it.
# python train.py config/recipe_distill.py
# Loss to expect: 1.706 on validation at 4 loops (1.737 without), 1.760 at two, 1.891 at one,
# 1.730 at eight.

from config.recipe_fixed import *

out_dir = "out-recipe-distill"
objective = "distill"
distill_weight = 0.5
