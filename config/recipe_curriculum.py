# A curriculum of depth: the mean number of loops rises over the first half of the run.
# python train.py config/recipe_curriculum.py
# Loss to expect: 1.788 on validation at 6 loops, 1.713 without: at this length the deep loops
# come too late.

from config.recipe import *

out_dir = "out-recipe-curriculum"
loop_warmup_iters = 500
loop_warmup = "sqrt"
