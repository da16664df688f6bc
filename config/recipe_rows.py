# Each window is looped another number of times, in place of all windows of a step alike.
# python train.py config/recipe_rows.py
# Loss to expect: 1.716 on validation at 6 loops, 1.984 at one; 1.713 and 2.017 with one count for
# all windows.

from config.recipe import *

out_dir = "out-recipe-rows"
loops_per_row = True
