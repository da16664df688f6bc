# The block of train_shakespeare_char_cpu_looped.py, looped seven times on average from the first
# step on, for 1,000 steps: what the recipes beside it compare with.
# python train.py config/recipe.py
# Loss to expect: 1.713 on validation at 6 loops, the same at 24, 2.017 at one; about 3 minutes on
# one CPU core.

from config.train_shakespeare_char_cpu_looped import *

out_dir = "out-recipe"
n_loop = 6
loop_start = 0.0
loop_sampling = "poisson"
max_iters = 1000
eval_interval = 1000
eval_iters = 150  # all of validation
eval_loops = 1, 2, 4, 6, 12, 24
