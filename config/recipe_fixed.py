# The looped block at a fixed depth of four, gradient through all loops: what the recipes with a
# loss at every loop are compared with.
# python train.py config/recipe_fixed.py
# Loss to expect: 1.737 on validation at 4 loops, 2.211 at two, 2.788 at one, 2.001 at eight.

from config.recipe import *

out_dir = "out-recipe-fixed"
loop_sampling = "fixed"
n_loop = 4
bptt_k = 0
eval_loops = 1, 2, 3, 4, 8
